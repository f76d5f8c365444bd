"""What a run reads before it trains: who may be resumed and who may not; and a run as a process."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from dsv3_jax.checkpoint import store
from dsv3_jax.config.load import load_json
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.train import memory, snapshot
from dsv3_jax.train import run as run_module
from dsv3_jax.train.folder import RunFolder, locked
from dsv3_jax.train.run import prepare
from dsv3_jax.train.snapshot import Position
from dsv3_jax.train.start import started
from tests.runs import SmallRun, contents, random_state, with_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def stored(small: SmallRun) -> Path:
    """A run that somebody stopped after 4 of its 6 steps. Not to be changed."""
    cfg = replace(small.cfg, output=replace(small.cfg.output, folder=str(small.home / "stored")))
    with small.quick():
        prepared = prepare(cfg, None, lambda line: None)
    data = {
        "content": prepared.corpus.content_hash,
        "tokenizer": prepared.corpus.tokenizer.content_hash,
    }
    state = random_state(cfg)
    for step in (3, 4):
        position = Position(step, 2 * step)
        now = snapshot.Snapshot(state, position)
        store.save(prepared.run.checkpoints, step, *snapshot.contents(cfg, now, data))
    return prepared.run.path


@pytest.fixture
def copy(stored: Path, tmp_path: Path) -> Path:
    """That run once more, to be changed."""
    return Path(shutil.copytree(stored, tmp_path / "copies" / "small-001"))


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
        (("--train.steps", 3), "train.steps is 3; allowed: at least 4"),
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
    entry = '{"kind": "train", "step": 1, "tokens": 32}\n'
    (copy / "metrics.jsonl").write_text(f"{entry}damaged\n{entry}")
    before = contents(copy)
    with pytest.raises(SystemExit) as stop:
        small.train("--resume", copy)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "metrics.jsonl, line 2: found b'damaged'" in line
    assert contents(copy) == before


def test_a_run_without_a_usable_checkpoint_is_not_resumed(
    small: SmallRun, copy: Path, capsys: pytest.CaptureFixture
):
    for meta in copy.glob("checkpoints/*/meta.json"):
        meta.write_text("{}")
    with pytest.raises(SystemExit) as damaged:
        small.train("--resume", copy)
    for marker in copy.glob("checkpoints/*/COMMITTED"):
        marker.unlink()
    with pytest.raises(SystemExit) as uncommitted:
        small.train("--resume", copy)
    assert damaged.value.code == uncommitted.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "no usable checkpoint" in first
    assert "all 2 fail" in first
    assert f"no checkpoint in {copy / 'checkpoints'}" in second


def test_a_writer_that_refuses_leaves_nothing_behind(
    small: SmallRun,
    copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    """Neither a new folder nor another configuration in an old one."""

    def refuse(*args):
        raise ValueError("output.wandb is 'p': no key")

    monkeypatch.setattr(run_module, "open_writers", refuse)
    before = contents(copy)
    runs = tmp_path / "runs"
    for args in (("--resume", copy), ("--config", small.config, "--output.folder", runs)):
        with pytest.raises(SystemExit) as stop:
            small.train(*args, "--train.steps", 9)
        assert stop.value.code == 2
    assert capsys.readouterr().err == 2 * "error: output.wandb is 'p': no key\n"
    assert contents(copy) == before
    assert list(runs.iterdir()) == []


def prepared_from(small: SmallRun, source: Path, folder: Path, tokenizer: Path) -> tuple:
    """A new run from the weights of another, ready to start, and what was said meanwhile."""
    cfg = replace(
        small.cfg,
        data=replace(small.cfg.data, tokenizer=str(tokenizer)),
        output=replace(small.cfg.output, folder=str(folder)),
    )
    said: list[str] = []
    with small.quick():
        return prepare(cfg, None, said.append, RunFolder(source)), said


def test_weights_come_with_the_tokenizer_of_their_run(small: SmallRun, copy: Path, tmp_path: Path):
    """Even if the file that it was read from is another one by now."""
    config = json.loads((copy / "config.json").read_text())
    config["data"]["tokenizer"] = str(tmp_path / "gone.json")
    (copy / "config.json").write_text(json.dumps(config))
    prepared, said = prepared_from(small, copy, tmp_path / "runs", tmp_path / "gone.json")
    assert prepared.run.tokenizer.read_bytes() == (copy / "tokenizer.json").read_bytes()
    assert not any("warning" in line for line in said)


def test_another_tokenizer_than_that_of_the_weights_is_warned_of(
    small: SmallRun, copy: Path, tmp_path: Path
):
    other = tmp_path / "other.json"
    train_tokenizer(["a text of other words " * 20], 300).save(other)
    prepared, said = prepared_from(small, copy, tmp_path / "runs", other)
    assert prepared.run.tokenizer.read_bytes() == other.read_bytes()
    assert any(
        "warning" in line and f"data.tokenizer {other} is not the one" in line for line in said
    )


def test_a_model_that_does_not_fit_is_refused_before_its_folder_is_made(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(memory, "memory_size", lambda: 10**5)
    with pytest.raises(SystemExit) as stop:
        small.train("--config", small.config, "--output.folder", tmp_path)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "parameters, whose masters, moments and gradients take 0 GB; this machine has 0 GB" in line
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."),
        MemoryError("Unable to allocate 9 bytes"),
    ],
    ids=["device", "host"],
)
def test_a_batch_that_does_not_fit_is_one_line(
    small: SmallRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    error: Exception,
):
    """And names what the plan has on the fullest rank, and what would hold less."""

    def full(*args: object) -> None:
        raise error

    monkeypatch.setattr(run_module, "_execute", full)
    with pytest.raises(SystemExit) as stop:
        small.train("--config", small.config, "--output.folder", tmp_path)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"out of memory: {error}; planned on rank 0: " in line
    # One device computes with the masters: there are no other weights.
    for term in ("masters", "moments", "gradients", "residuals", "workspace"):
        assert f"{term} " in line
    assert "weights " not in line
    assert "; smaller: --" in line


def test_a_run_that_another_process_trains_is_left_alone(
    small: SmallRun, copy: Path, capsys: pytest.CaptureFixture
):
    before = contents(copy)
    with locked(RunFolder(copy)), pytest.raises(SystemExit) as stop:
        small.train("--resume", copy)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {copy}: another process is training this run\n"
    assert contents(copy) == before


def test_a_run_that_was_never_saved_starts_over(small: SmallRun, copy: Path):
    """Killed while it wrote its first checkpoint."""
    checkpoints = copy / "checkpoints"
    (checkpoints / "step_00000003").rename(checkpoints / "step_00000003.tmp-01ab23cd")
    (checkpoints / "step_00000004" / "COMMITTED").unlink()
    with small.quick():
        prepared = prepare(load_json(copy / "config.json"), RunFolder(copy), lambda line: None)
        said: list[str] = []
        *_, programs = run_module._programs(prepared.cfg)
        start = started(prepared, programs, said.append)
    assert (prepared.run.path, prepared.is_new) == (copy, False)
    assert start.position == Position()
    assert not list((copy / "checkpoints").iterdir())
    assert said == ["           never saved: starting over"]


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
