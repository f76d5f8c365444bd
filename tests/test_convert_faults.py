"""Folders and names that nobody would wish for: one line, exit code 2, and nothing half-written;
signals leave nothing behind.
"""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv3_jax.checkpoint import hf, new_folder, store, tensor_file
from dsv3_jax.convert import main
from dsv3_jax.data.tokenizer import train_tokenizer
from tests.checkpoint.hf_folders import SMALL, edit_config, random_tensors, write_folder
from tests.checkpoint.run_folders import write_run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = write_folder(tmp_path / "hf", SMALL, random_tensors(SMALL, fp8=False))
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", 3, 4)


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The error line of a command that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()
    (line,) = (line for line in said if line.startswith("error: "))
    return line


def inspected(capsys: pytest.CaptureFixture[str], path: Path) -> str:
    capsys.readouterr()
    assert not main(["inspect", str(path)])
    return capsys.readouterr().out


# --- OUT -----------------------------------------------------------------------------------------


def in_a_loop(folder: Path) -> Path:
    for one, other in (("a", "b"), ("b", "a")):
        (folder / one).symlink_to(folder / other)
    return folder / "a"


def below_a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file" / "x" / "out"


def among_checkpoints(folder: Path) -> Path:
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "run" / "config.json").touch()
    return folder / "run" / "checkpoints" / "step_00000007"


OUTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a loop of links": (in_a_loop, "a is a loop of links; allowed: a new folder"),
    "below a file": (below_a_file, "file is a file; allowed: a new folder"),
    "a name too long": (lambda folder: folder / ("x" * 250), "cannot be written: File name too"),
    "much too long": (lambda folder: folder / ("x" * 300), "File name too long"),
    "nowhere to write": (lambda folder: Path("/proc/out"), "/proc/out cannot be written"),
    "a checkpoint": (among_checkpoints, "lies among a run's checkpoints; allowed: another"),
}


@pytest.mark.parametrize("kind", OUTS)
@pytest.mark.parametrize("command", ["import", "export"])
def test_an_out_that_cannot_be_is_told_before_a_model_is_read(
    tmp_path: Path, source: Path, capsys, monkeypatch: pytest.MonkeyPatch, kind: str, command: str
):
    monkeypatch.setattr(hf, "check_count", lambda *args: pytest.fail("loading"))
    make, said = OUTS[kind]
    out = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert said in refused(capsys, command, source, out)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_another_process_writes_is_left_to_it(tmp_path: Path, source: Path, capsys):
    with new_folder.new_folder(tmp_path / "out", 100, overwrite=False) as held:
        (held / "config.json").touch()
        line = refused(capsys, "export", source, tmp_path / "out")
    assert line.endswith("another process is writing it; allowed: to wait, or another folder")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


def test_a_full_disk_is_told_with_the_file_that_was_to_be(
    tmp_path: Path, source: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(tensor_file.os, "fsync", full)
        line = refused(capsys, "export", source, tmp_path / "out")
    assert f"cannot write {tmp_path / 'out' / 'model.safetensors'}: No space left" in line
    assert sorted(tmp_path.rglob("*")) == before


def test_names_that_are_no_text_and_lines_in_names_are_taken(tmp_path: Path, source: Path, capsys):
    out = tmp_path / os.fsdecode(b"\xff\n#1 %41")
    assert not main(["export", str(source), str(out)])
    assert capsys.readouterr().out.startswith(f"{tmp_path}/")
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_an_import_to_a_name_that_is_no_text_is_refused_at_once(tmp_path: Path, source, capsys):
    out = tmp_path / os.fsdecode(b"out\xff")
    line = refused(capsys, "import", source, out)
    assert line.endswith(r"out\udcff: not UTF-8; allowed for checkpoints: UTF-8")
    assert not out.exists()


# --- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("within", ["checkpoints", "checkpoints/step_00000003"])
def test_a_run_s_checkpoints_are_taken_for_the_run(tmp_path: Path, run: Path, capsys, within: str):
    assert not main(["export", str(run / within), str(tmp_path / "out")])
    step = 3 if "step" in within else 4
    assert f"exported step {step} of {run / within}" in capsys.readouterr().out
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    text = inspected(capsys, run / within)
    assert f"folder     {run}: a run" in text
    assert f"step       {step}\n" in text


def test_a_run_without_an_average_is_not_called_damaged(tmp_path: Path, run: Path, capsys):
    line = refused(capsys, "export", run, tmp_path / "out", "--ema")
    assert line == (
        f"error: {run}: step 4 holds no average of the weights; allowed: steps of a run whose "
        "optimizer.ema_decay is above 0"
    )


def test_an_import_says_that_its_tokenizer_is_of_no_use(tmp_path: Path, source: Path, capsys):
    for spoil, said in (
        (lambda file: None, "tokenizer.json is no tokenizer.json: "),
        (lambda file: train_tokenizer(["some text"], 262).save(file), "has ids up to 261; allowed"),
        (lambda file: file.unlink(), "neither tokenizer.json nor tiktoken.model"),
    ):
        spoil(source / "tokenizer.json")
        assert not main(["import", str(source), str(tmp_path / "out"), "--overwrite"])
        (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("warning: "))
        assert said in line
        assert "tokenizer  none that can be used: " in inspected(capsys, source)


def test_what_a_folder_says_cannot_steer_a_terminal(source: Path, capsys):
    edit_config(source, model_type="x\n\x1b[31m", quantization_config={"a\nb": 1})
    text = inspected(capsys, source)
    assert r"Hugging Face, x\n\x1b[31m" in text
    assert r"quantised  a\nb 1" in text


def test_inspect_tells_of_the_tokenizer(run: Path, capsys):
    assert "tokenizer  tokenizer.json, 262 ids, begin 0, end 1\n" in inspected(capsys, run)


def test_inspect_says_how_a_folder_without_its_mtp_modules_is_taken(source: Path, capsys):
    edit_config(source, num_nextn_predict_layers=1)
    assert "MTP        config.json has num_nextn_predict_layers 1, but there is no tensor " in (
        text := inspected(capsys, source)
    )
    assert "--skip-mtp" in text


def test_inspect_passes_over_a_damaged_checkpoint(tmp_path: Path, capsys):
    run = write_run(tmp_path / "run", 3, 4)
    (run / "checkpoints/step_00000004/manifest.json").write_text("[1]")
    text = inspected(capsys, run)
    assert "damaged    checkpoint skipped: " in text
    assert "step       3\n" in text


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": "yarn"},
        {"quantization_config": [1]},
        {"hidden_size": 2**63},
        {"rms_norm_eps": 10**399},
        {"num_hidden_layers": 9000, "n_routed_experts": 9000},
        {"model_type": ["deepseek_v3"]},
        {"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 1},
    ],
    ids=str,
)
def test_odd_configurations_are_refused_and_can_be_looked_at(
    tmp_path: Path, source: Path, capsys, fields: dict
):
    edit_config(source, **fields)
    for command in ("import", "export"):
        assert str(source) in refused(capsys, command, source, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert "tensors    " in inspected(capsys, source)


# --- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["import", "export"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=str)
def test_a_signal_ends_the_writing_and_undoes_it(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, command: str, number
):
    """^C is told by its exit code where the command is run, see `cli.run`."""
    before, handler = sorted(tmp_path.rglob("*")), signal.default_int_handler
    if number != signal.SIGINT:
        handler = signal.SIG_DFL  # not what nohup leaves
    at_birth = signal.signal(number, handler)
    module, name = (store, "write_arrays") if command == "import" else (hf, "write_file")
    monkeypatch.setattr(module, name, lambda *args: signal.raise_signal(number))
    try:
        with pytest.raises(KeyboardInterrupt):
            main([command, str(source), str(tmp_path / "out")])
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, at_birth)
    assert sorted(tmp_path.rglob("*")) == before
