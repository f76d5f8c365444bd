"""The command line: help, printed configuration, overrides, which run is resumed, and one line with
exit code 2 for every bad input.
"""

import dataclasses
import errno
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from dsv3_jax.config.presets import tiny_run
from dsv3_jax.config.run import RunConfig, from_dict
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.train.__main__ import main, resolve
from tests.commands import help_of
from tests.runs import SmallRun

ROOT = Path(__file__).parents[2]


# --- help and printed configuration ---


def test_help_mentions_every_option_and_loads_no_jax():
    shown, loaded = help_of("dsv3_jax.train.__main__")
    assert loaded.isdisjoint({"jax", "jaxlib", "flax", "optax", "orbax", "chex", "grain", "numpy"})
    options = {"--config", "--resume", "--print-config", "--model.yarn.factor"}
    for section in dataclasses.fields(RunConfig):
        names = {field.name for field in dataclasses.fields(section.default_factory)}
        from_files_only = {name for name in names if name.endswith(("_phases", "groups"))}
        names -= {"yarn", *from_files_only}  # a section of its own
        options |= {f"--{section.name}.{name.replace('_', '-')}" for name in names}
    assert options <= set(re.findall(r"--[a-z][\w.-]*", shown))


def test_the_schedule_of_a_config_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture):
    config = ROOT / "configs" / "dsv3_671b.py"
    assert main(["--config", str(config), "--print-schedule", str(tmp_path / "s.png")]) == 0
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.startswith("244,829 steps, 14,8")
    with pytest.raises(SystemExit) as stop:
        main(["--print-schedule", str(tmp_path / "s.txt")])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--print-schedule is" in line


def test_help_needs_no_run_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        main(["--resume", "--help", "--output.folder", str(tmp_path)])
    assert stop.value.code == 0
    assert "usage" in capsys.readouterr().out


def printed(args: list[str], capsys: pytest.CaptureFixture) -> RunConfig:
    """What --print-config prints, read back."""
    assert main([*args, "--print-config"]) == 0
    return from_dict(RunConfig, json.loads(capsys.readouterr().out))


def test_printed_configuration_reads_back_as_the_same_run(
    small: SmallRun, capsys: pytest.CaptureFixture
):
    assert printed([], capsys) == tiny_run()
    assert printed(["--config", str(small.config)], capsys) == small.cfg


def test_flags_override_the_config_file_and_leave_the_rest(
    small: SmallRun, capsys: pytest.CaptureFixture
):
    flags = "--train.steps 9 --model.q-latent None --optimizer.moment_dtype float32".split()
    sources = ["--data.source", "a/*.txt", "stdlib"]
    found = printed(["--config", str(small.config), *flags, *sources], capsys)
    assert found == replace(
        small.cfg,
        train=replace(small.cfg.train, steps=9),
        model=replace(small.cfg.model, q_latent=None),
        optimizer=replace(small.cfg.optimizer, moment_dtype="float32"),
        data=replace(small.cfg.data, source=("a/*.txt", "stdlib")),
    )


# --- which run is resumed ---


@pytest.fixture
def runs(small: SmallRun, tmp_path: Path) -> Path:
    """Folders of two runs with configurations of their own; b-001 is the newer one."""
    for age, name in enumerate(("b-001", "a-002"), start=1):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        cfg = replace(small.cfg, train=replace(small.cfg.train, rows=6 * age))
        (folder / "config.json").write_text(cfg.to_json())
        os.utime(folder / "config.json", (2e9 - age, 2e9 - age))
    (tmp_path / "runs" / "c-003").mkdir()  # of a run that never got a configuration
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("args", "name"),
    [
        ("--resume newest", "b-001"),
        ("--resume a-002", "a-002"),
        ("--resume=a-002", "a-002"),
        ("--resume {runs}/a-002", "a-002"),
    ],
)
def test_resume_takes_the_newest_run_or_the_one_named_with_its_own_configuration(
    runs: Path, args: str, name: str
):
    words = args.format(runs=runs).split()
    options, folder, _ = resolve(["--output.folder", str(runs), "--train.steps", "7", *words])
    assert folder.path == runs / name
    assert options.run.train.steps == 7
    assert options.run.train.rows == {"b-001": 6, "a-002": 12}[name]


def test_resume_without_a_value_means_the_newest(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    for args in (["--resume"], ["--resume", "--train.steps", "7"]):
        cfg = printed([*args, "--output.folder", str(runs)], capsys)
        assert cfg.train.rows == 6
    monkeypatch.chdir(runs.parent)  # where the default folder is
    assert printed(["--resume"], capsys).train.rows == 6


def test_a_flag_with_an_underscore_or_given_twice_is_read_as_the_parser_reads_it(tmp_path: Path):
    for words in (["--init_from", "nowhere"], ["--init-from", "x", "--init-from=nowhere"]):
        with pytest.raises(ValueError, match="--init-from nowhere: no run there"):
            resolve(["--output.folder", str(tmp_path), *words])


def test_flags_are_judged_by_the_resumed_configuration_alone(
    runs: Path, capsys: pytest.CaptureFixture
):
    args = ["--output.folder", str(runs), "--resume", "b-001", "--train.microbatches", "3"]
    assert tiny_run().train.rows % 3  # the default run would refuse it
    assert printed(args, capsys).train.microbatches == 3


def test_a_config_file_counts_before_the_resumed_configuration(
    small: SmallRun, runs: Path, capsys: pytest.CaptureFixture
):
    args = ["--config", str(small.config), "--output.folder", str(runs), "--resume", "a-002"]
    assert printed(args, capsys).train.rows == small.cfg.train.rows


# --- bad input ---


CONFIG_FILES = {
    "raises": "def config():\n    return 1 / 0\n",
    "raises_on_import": "import dsv3_jax\n\nimport no_such_module\n",
    "helper": "import fractions\ndef config():\n    return fractions.Fraction(1, 0)\n",
    "syntax": "def config():\n    return (\n",
    "nul": "def config():\n    return '\0'\n",
    "exits": "import sys\ndef config():\n    sys.exit(0)\n",
    "nothing": "def config():\n    pass\n",
    "absent": "configuration = 3\n",
    "value": (
        "from dsv3_jax.config import TrainConfig\ndef config():\n"
        "    return TrainConfig(\n        steps=0,\n    )\n"
    ),
    "choice": (
        "from dataclasses import replace\nfrom dsv3_jax.config.presets import tiny_run\n"
        "def config():\n    run = tiny_run()\n"
        "    return replace(run, train=replace(run.train, dtype='float16'))\n"
    ),
    "field": "from dsv3_jax.config import TrainConfig\ndef config():\n    TrainConfig(stepz=1)\n",
}
DAMAGED = {
    "torn": '{"model": {"vocab_size": 3',
    "list": "[]",
    "section": '{"model": []}',
    "unknown": '{"model": {"d_modell": 3}}',
    "type": '{"train": {"steps": "3"}}',
    "empty": "",
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that nothing can be done with."""
    home = tmp_path_factory.mktemp("bad")
    (home / "text.txt").write_text("def f(x):\n    return x\n\n" * 20)
    (home / "empty.txt").write_text("")
    (home / "latin.txt").write_bytes("café".encode("latin-1"))
    (home / "folder").mkdir()
    (home / "broken.json").write_text('{"model"')
    train_tokenizer([f"word{i} word{i} " for i in range(300)], 400).save(home / "large.json")
    words = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "?": 1, "def": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(home / "lossy.json"))
    for name, text in CONFIG_FILES.items():
        (home / f"{name}.py").write_text(text)
    for name, text in DAMAGED.items():
        (home / "damaged" / name).mkdir(parents=True)
        (home / "damaged" / name / "config.json").write_text(text)
    return home


def refusal(small: SmallRun, args: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line on stderr with which the command ends, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        small.train(*args)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


# Flags, and what the line must say.
BAD_FLAGS = [
    # the command line
    (
        "--train.stepz 3",
        "Unrecognized options: --train.stepz, 3; perhaps you meant --train.steps",
    ),
    ("--trian.steps 3", "--trian.steps"),
    ("--schedule.phases 3", "--schedule.phases"),
    ("surplus", "Unrecognized options: surplus"),
    ("--train.steps three", "--train.steps is 'three'; allowed: whole numbers"),
    ("--train.steps 1.5", "--train.steps is '1.5'; allowed: whole numbers"),
    ("--train.steps", "--train.steps"),
    ("--train.dtype float16", "'float16' for argument '--train.dtype'"),
    ("--model.tied-head perhaps", "perhaps"),
    # impossible sizes
    ("--model.num_groups 3", "model.num_groups is 3, which does not divide num_experts = 8"),
    ("--model.experts_per_token 5", "model.experts_per_token is 5; allowed: at most 4"),
    (
        "--model.num_kept_groups 5",
        "model.num_kept_groups is 5; allowed: at most num_groups = 4",
    ),
    ("--model.rope_dim 3", "model.rope_dim is 3; allowed: even sizes"),
    ("--model.num_heads 0", "model.num_heads is 0; allowed: at least 1"),
    ("--model.num_layers -1", "model.num_layers is -1; allowed: at least 1"),
    ("--model.num_dense_layers 3", "num_dense_layers is 3; allowed: at most num_layers = 2"),
    ("--data.length 65", "data.length is 65; allowed: at most model.max_length = 64"),
    ("--model.mtp_depth 16", "data.length is 16; allowed: more than model.mtp_depth = 16"),
    ("--train.rows 0", "train.rows is 0; allowed: at least 1"),
    ("--train.rows 3 --train.microbatches 2", "2, which does not divide train.rows = 3"),
    ("--optimizer.b1 1", "optimizer.b1 is 1.0; allowed: 0 to below 1"),
    ("--optimizer.clip_norm inf", "optimizer.clip_norm is inf; allowed: finite numbers"),
    ("--optimizer.weight_decay nan", "optimizer.weight_decay is nan"),
    ("--train.seed -1", "train.seed is -1; allowed: 0 to 2^32 - 1"),
    ("--output.save_every 0", "output.save_every is 0; allowed: at least 1"),
    ("--output.name a/b", "output.name is 'a/b'; allowed: a name without '/'"),
    ("--train.dtype float64", "train.dtype is float64; JAX has it only with JAX_ENABLE_X64=1"),
    # data
    ("--data.source {bad}/no*.txt", "data.source '{bad}/no*.txt': no file matches"),
    ("--data.source {bad}/[nothing].txt", "data.source '{bad}/[nothing].txt': no file"),
    ("--data.source {bad}/missing.txt", "data.source '{bad}/missing.txt': no file matches"),
    ("--data.source {bad}/empty.txt", "data.source '{bad}/empty.txt': no text in 1 files"),
    ("--data.source {bad}/folder", "{bad}/folder is a folder; allowed: files"),
    (
        "--data.source {bad}/latin.txt",
        "{bad}/latin.txt is not utf-8 text: byte 0xe9 at offset 3",
    ),
    ("--data.validation_fraction 1", "data.validation_fraction is 1.0; allowed: between 0 and"),
    # tokenizers
    ("--data.tokenizer {bad}/missing.json", "{bad}/missing.json: cannot read it: No such file"),
    ("--data.tokenizer {bad}/broken.json", "{bad}/broken.json is no tokenizer.json"),
    ("--data.tokenizer {bad}/latin.txt", "{bad}/latin.txt is no tokenizer.json"),
    ("--data.tokenizer {bad}/large.json", "has 400 ids; model.vocab_size is 300"),
    ("--data.tokenizer {bad}/lossy.json", "{bad}/lossy.json does not keep document"),
    ("--model.vocab_size 261", "model.vocab_size is 261"),
    # config files
    ("--config {bad}/missing.py", "--config {bad}/missing.py: no such file"),
    ("--config {bad}/folder", "--config {bad}/folder: a folder; allowed: a Python file"),
    (
        "--config {bad}/raises.py",
        "{bad}/raises.py, line 2: ZeroDivisionError: division by zero",
    ),
    ("--config {bad}/raises_on_import.py", "line 3: ModuleNotFoundError: No module named"),
    ("--config {bad}/helper.py", "{bad}/helper.py, line 3: ZeroDivisionError: Fraction(1, 0)"),
    ("--config {bad}/syntax.py", "{bad}/syntax.py, line 2: SyntaxError: '(' was never closed"),
    ("--config {bad}/nul.py", "source code string cannot contain"),
    ("--config {bad}/exits.py", "{bad}/exits.py, line 3: SystemExit: 0"),
    ("--config {bad}/nothing.py", "config() returned NoneType; it must return a RunConfig"),
    ("--config {bad}/absent.py", "{bad}/absent.py: no function config()"),
    ("--config {bad}/value.py", "line 3: ValueError: train.steps is 0; allowed: at least 1"),
    ("--config {bad}/choice.py", "line 5: ValueError: train.dtype is 'float16'; allowed:"),
    ("--config {bad}/field.py", "line 3: TypeError: TrainConfig.__init__() got an unexpected"),
    ("--config {bad}/latin.txt", "{bad}/latin.txt"),
    # what to resume
    ("--resume", "--resume: no run in"),
    ("--resume small-001", "--resume small-001: no run there"),
    ("--resume {bad}", "--resume {bad}: no run there"),
]


@pytest.mark.parametrize(("flags", "said"), BAD_FLAGS)
def test_bad_input_ends_with_one_line_and_leaves_no_run_behind(
    small: SmallRun, bad: Path, flags: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    words = flags.format(bad=bad).split()
    words += [] if "--config" in words else ["--config", str(small.config)]
    line = refusal(small, [*words, "--output.folder", str(tmp_path / "runs")], capsys)
    assert said.format(bad=bad) in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_configuration_of_a_run_is_refused(
    small: SmallRun, bad: Path, name: str, capsys: pytest.CaptureFixture
):
    run = bad / "damaged" / name
    line = refusal(small, ["--resume", str(run)], capsys)
    assert f"{run}/config.json: not a readable configuration: " in line
    assert (run / "config.json").read_text() == DAMAGED[name]


def test_an_empty_value_is_a_bad_source(small: SmallRun, capsys: pytest.CaptureFixture):
    line = refusal(small, ["--config", str(small.config), "--data.source", ""], capsys)
    assert "data.source is empty" in line


def test_unreadable_data_is_refused(
    small: SmallRun, bad: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def forbidden(path: Path) -> bytes:  # root may read every file
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    args = ["--config", str(small.config), "--data.source", str(bad / "text.txt")]
    assert f"cannot read {bad / 'text.txt'}: Permission denied" in refusal(small, args, capsys)


def test_an_output_folder_below_a_file_is_refused(
    small: SmallRun, bad: Path, capsys: pytest.CaptureFixture
):
    folder = bad / "text.txt" / "runs"
    args = ["--config", str(small.config), "--output.folder", str(folder)]
    line = refusal(small, args, capsys)
    assert f"output.folder {folder} cannot be written to: {bad / 'text.txt'} is a file" in line


@pytest.mark.parametrize("what", ["access", "mkdir"])  # root may do all; some mounts lie
def test_a_read_only_output_folder_is_refused(
    small: SmallRun,
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    make = Path.mkdir

    def forbidden(path: Path, *args, **kwargs) -> None:
        if path.parent == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        make(path, *args, **kwargs)

    if what == "access":
        monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    else:
        monkeypatch.setattr(Path, "mkdir", forbidden)
    args = ["--config", str(small.config), "--output.folder", str(tmp_path)]
    line = refusal(small, args, capsys)
    assert f"output.folder {tmp_path} cannot be written to: Permission denied" in line
    assert not list(tmp_path.iterdir())


def test_a_run_that_may_not_be_written_to_is_not_resumed(
    small: SmallRun, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    line = refusal(small, ["--resume", str(runs / "a-002")], capsys)
    assert "a-002: the folder cannot be written to" in line
