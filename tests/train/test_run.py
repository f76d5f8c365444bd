"""A run from start to end: exact resume, clean stops, folders of its own, refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dsv3_jax.checkpoint import store
from dsv3_jax.checkpoint.arrays import CheckpointError
from dsv3_jax.config.run import RunConfig, from_dict
from dsv3_jax.data import corpus
from tests.runs import (
    SmallRun,
    assert_same_checkpoint,
    send_at_step,
    timeless,
    with_model,
    write_config,
)

ROOT = Path(__file__).parents[2]


def result_of(run: Path) -> dict:
    """What `result.json` says that no clock measured and no folder is named in."""
    result = json.loads((run / "result.json").read_text())
    measured = {"seconds", "tokens_per_second", "matmul_share"}
    return {k: v for k, v in result.items() if k not in measured and str(run) not in str(v)}


def assert_same_run(run: Path, other: Path) -> None:
    """The same curve, the same final state, the same result and sample."""
    assert timeless(run) == timeless(other)
    assert_same_checkpoint(run, other, 6)
    assert result_of(run) == result_of(other)
    for name in ("sample.txt", "tokenizer.json"):
        assert (run / name).read_bytes() == (other / name).read_bytes()


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The finished run once more, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "copies" / "small-001"))


# --- resume ---


def test_a_run_stopped_by_signals_and_damaged_ends_as_the_uninterrupted_one_bit_for_bit(
    small: SmallRun,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    runs, run = tmp_path / "runs", tmp_path / "runs" / "small-001"
    start = ("--config", small.config, "--output.folder", runs)
    resume = ("--output.folder", runs, "--resume")

    with monkeypatch.context() as patch:
        send_before_the_first_step(patch)
        assert small.train(*start) == 143
    assert f"SIGTERM: saved step 0; go on with --resume {run}" in capsys.readouterr().out
    assert store.steps(run / "checkpoints") == [0]

    with monkeypatch.context() as patch:
        send_at_step(patch, 3, signal.SIGTERM)
        assert small.train(*resume) == 143
    shown = capsys.readouterr().out
    assert f"SIGTERM: saved step 3; go on with --resume {run}\n" in shown
    assert "warning" not in shown
    assert store.steps(run / "checkpoints") == [0, 3]

    with monkeypatch.context() as patch:
        send_at_step(patch, 5, signal.SIGINT)
        assert small.train(*resume) == 130
    assert f"SIGINT: saved step 5; go on with --resume {run}" in capsys.readouterr().out

    with open(run / "metrics.jsonl", "a") as log:
        log.write('{"kind": "train", "step": 6, "lo')  # torn, as by a kill
    (run / "checkpoints" / "step_00000005" / "manifest.json").write_text("{}")
    assert small.train(*resume) == 0
    shown = capsys.readouterr().out
    assert "checkpoint skipped" in shown
    assert f"run        {run}\n           resumed after step 4\n" in shown
    assert store.steps(run / "checkpoints") == [0, 3, 4, 5, 6]
    moved = replace(small.cfg, output=replace(small.cfg.output, folder=str(runs)))
    assert store.load(run / "checkpoints").meta["config"] == json.loads(moved.to_json())
    rewrite_folder(run, finished)
    assert_same_run(run, finished)


def send_before_the_first_step(patch: pytest.MonkeyPatch) -> None:
    """SIGTERM comes as soon as both signals are heard."""
    install, sent = signal.signal, []

    def installed(number, handler):
        previous = install(number, handler)
        if number == signal.SIGINT and not sent:
            sent.append(number)
            os.kill(os.getpid(), signal.SIGTERM)
        return previous

    patch.setattr(signal, "signal", installed)


def rewrite_folder(run: Path, other: Path) -> None:
    """Saves the last checkpoint of `run` again as one of a run in `other`'s folder."""
    checkpoint = store.load(run / "checkpoints")
    checkpoint.meta["config"]["output"]["folder"] = str(other.parent)
    store.save(run / "checkpoints", checkpoint.step, checkpoint.arrays, checkpoint.meta)


def test_a_second_run_leaves_the_first_alone_and_three_steps_and_three_more_are_six_bit_for_bit(
    small: SmallRun, finished: Path, tmp_path: Path
):
    runs, run = tmp_path / "runs", tmp_path / "runs" / "small-002"
    shutil.copytree(finished, runs / "small-001")
    write_config(tmp_path / "half.py", replace(small.cfg, train=replace(small.cfg.train, steps=3)))
    folder = ("--output.folder", runs)
    assert small.train("--config", tmp_path / "half.py", *folder) == 0
    assert small.train("--resume", *folder, "--train.steps", 6) == 0
    assert sorted(path.name for path in runs.iterdir()) == ["small-001", "small-002"]
    assert contents(runs / "small-001") == contents(finished)

    rewrite_folder(run, finished)
    assert_same_checkpoint(run, finished, 6)
    entries = timeless(run)  # after its step 3 this one validated on all rows, not on 4
    assert [e["step"] for e in timeless(finished) if e not in entries] == [3]
    assert [e["step"] for e in entries if e not in timeless(finished)] == [3, 3]


def test_a_resumed_run_keeps_its_own_tokenizer_and_sweeps_up_after_a_kill(
    small: SmallRun, copy: Path, monkeypatch: pytest.MonkeyPatch
):
    """Another version of the library might train another one from the same text."""
    monkeypatch.setattr(corpus, "cached_tokenizer", None)
    (copy / "checkpoints" / "step_00000005.tmp-0123abcd").mkdir()
    assert small.train("--resume", copy) == 0
    assert [path.name[-1] for path in sorted((copy / "checkpoints").iterdir())] == ["4", "6"]


def test_a_finished_run_resumed_again_trains_and_changes_nothing(
    small: SmallRun, finished: Path, copy: Path, capsys: pytest.CaptureFixture
):
    assert small.train("--resume", copy) == 0
    shown = capsys.readouterr().out
    assert "bits per byte of validation text" in shown
    assert "compiling" not in shown
    assert_same_run(copy, finished)
    assert (copy / "metrics.jsonl").read_text() == (finished / "metrics.jsonl").read_text()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_resolved_configuration_lies_beside_the_run_and_in_every_checkpoint(
    small: SmallRun, finished: Path
):
    written = json.loads((finished / "config.json").read_text())
    assert from_dict(RunConfig, written) == small.cfg
    for step in store.steps(finished / "checkpoints"):
        assert store.load(finished / "checkpoints", step).meta["config"] == written


# --- refusals ---


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--model.d_model", 48), "model.d_model is 48, was 32"),
        (("--model.num_layers", 3), "model.num_layers is 3, was 2"),
        (("--model.gate_scale", 2), "model.gate_scale is 2.0, was 2.5"),  # no shape would tell
        (("--data.length", 12), "data.length is 12, was 16"),
        (("--data.validation_fraction", 0.3), "data.validation_fraction is 0.3, was 0.2"),
        (("--data.tokenizer", "{run}/tokenizer.json"), "data.tokenizer is {run}/tokenizer.json"),
        (("--train.seed", 1), "train.seed is 1, was 0"),
        (("--train.steps", 5), "train.steps is 5; allowed: at least 6"),
    ],
)
def test_resume_refuses_another_run_and_names_what_differs(
    small: SmallRun,
    copy: Path,
    args: tuple,
    said: str,
    capsys: pytest.CaptureFixture,
):
    before = contents(copy)
    with pytest.raises(SystemExit) as stop:
        small.train("--resume", copy, *(str(arg).format(run=copy) for arg in args))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --resume: ")
    assert said.format(run=copy) in line
    assert contents(copy) == before


def test_resume_names_every_field_that_differs(
    small: SmallRun, copy: Path, capsys: pytest.CaptureFixture
):
    with pytest.raises(SystemExit):
        small.train("--resume", copy, "--model.num_experts", 16, "--train.seed", 3)
    differ = "model.num_experts is 16, was 8; train.seed is 3, was 0"
    assert f"this is another run: {differ}\n" in capsys.readouterr().err


def test_resume_refuses_changed_text(
    small: SmallRun, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    text = Path(shutil.copytree(small.home / "text", tmp_path / "text"))
    checkpoint = store.load(copy / "checkpoints")
    source = checkpoint.meta["config"]["data"]["source"] = str(text / "*.txt")
    store.save(copy / "checkpoints", checkpoint.step, checkpoint.arrays, checkpoint.meta)
    (text / "0.txt").write_text((text / "0.txt").read_text() + "# one line more\n")
    with pytest.raises(SystemExit):
        small.train("--resume", copy, "--data.source", source)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"the text of data.source {source} has changed" in line


def test_resume_refuses_damaged_metrics_before_it_changes_them(
    small: SmallRun, copy: Path, capsys: pytest.CaptureFixture
):
    first, *others = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join([first, "damaged\n", *others]))
    before = contents(copy)
    with pytest.raises(SystemExit) as stop:
        small.train("--resume", copy)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "metrics.jsonl, line 2: found b'damaged'" in line
    assert contents(copy) == before


def test_a_checkpoint_of_another_model_is_refused_by_name(
    small: SmallRun, copy: Path, capsys: pytest.CaptureFixture
):
    other = with_model(small.cfg, num_heads=4)
    (copy / "config.json").write_text(other.to_json())
    with pytest.raises(SystemExit) as stop:
        small.train("--resume", copy)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.num_heads is 4, was 2" in line


def test_a_full_disk_ends_a_run_with_one_line_and_leaves_what_was_saved(
    small: SmallRun,
    copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    def full(*args: object) -> None:
        raise CheckpointError("cannot write checkpoint of step 6: No space left on device")

    store.delete(copy / "checkpoints", 6)
    monkeypatch.setattr(store, "save", full)
    with pytest.raises(SystemExit) as stop:
        small.train("--resume", copy)
    assert stop.value.code == 2
    message = "error: cannot write checkpoint of step 6: No space left on device\n"
    assert capsys.readouterr().err == message
    assert store.steps(copy / "checkpoints") == [4]


# --- as a user starts it ---


@pytest.mark.slow
def test_a_process_ended_by_sigterm_leaves_with_143_and_resumes_to_the_end(
    small: SmallRun, tmp_path: Path
):
    run, steps = tmp_path / "small-001", 4000  # ten seconds: the signal comes long before the end
    environment = os.environ | {
        "XDG_CACHE_HOME": str(small.home / "cache"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-u", "-W", "error", "-m", "dsv3_jax.train"]
    start = ["--config", str(small.config), "--output.folder", str(tmp_path)]
    often = ["--train.steps", str(steps), "--output.save_every", str(steps)]
    with subprocess.Popen(
        [*command, *start, *often, "--output.eval_every", str(steps)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if f"/{steps} " in line:
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stdout.read()
    assert process.returncode == 143, "".join(lines) + rest
    (step,) = store.steps(run / "checkpoints")
    assert 1 <= step < steps
    assert f"SIGTERM: saved step {step:,}; go on with --resume {run}\n" in rest
    assert "Traceback" not in rest

    resume = [*command, "--resume", str(run), "--train.steps", str(step + 3)]
    done = subprocess.run(resume, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert store.steps(run / "checkpoints") == [step, step + 3]
    assert "bits per byte of validation text" in done.stdout
