"""Training itself: what a run records and leaves behind, exact resume, clean stops."""

import errno
import json
import math
import os
import re
import shutil
import signal
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.checkpoint import store
from dsv3_jax.config.run import RunConfig, from_dict
from dsv3_jax.data import corpus
from dsv3_jax.train import loop
from dsv3_jax.train.metrics import read_metrics
from dsv3_jax.train.snapshot import Position
from dsv3_jax.train.validation import text_of
from tests.runs import (
    TIMES,
    SmallRun,
    assert_same_checkpoint,
    contents,
    send_at_step,
    timeless,
    write_config,
)


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The finished run once more, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "copies" / "small-001"))


def entries(run: Path, kind: str) -> list[dict]:
    return [entry for entry in read_metrics(run / "metrics.jsonl") if entry["kind"] == kind]


def test_a_run_logs_validates_and_saves_at_the_steps_it_was_told(finished: Path):
    train, validation = entries(finished, "train"), entries(finished, "validation")
    assert [entry["step"] for entry in train] == [1, 2, 4, 6]  # every 2, the first and the last
    assert [entry["step"] for entry in validation] == [3, 6]  # every 3, and the end
    assert store.steps(finished / "checkpoints") == [4, 6]  # every 4, and the end
    assert [entry["step"] for entry in entries(finished, "experts")] == [3, 6]
    assert [entry["step"] for entry in entries(finished, "sample")] == [3, 6]
    order = [entry["step"] for entry in timeless(finished)]
    assert order == sorted(order)


def test_an_entry_tells_where_the_run_stood_and_with_what(finished: Path, small: SmallRun):
    train = entries(finished, "train")
    for entry in train:
        assert entry["rows"] == 2 * entry["step"]
        assert entry["tokens"] == 2 * 16 * entry["step"]
        weights = entry["mtp_weight"], small.cfg.train.balance_weight
        parts = entry["mtp_loss"], entry["balance_loss"]
        total = entry["main_loss"] + sum(w * x for w, x in zip(weights, parts, strict=True))
        assert entry["loss"] == pytest.approx(total, rel=1e-6)
        assert all(entry[name] > 0 for name in (*TIMES, "grad_norm", "max_violation"))
        assert 0 < entry["data_wait"] < 1
        assert entry["step_rows"] == 2
        assert entry["skipped"] == 0
        assert entry["bias_min"] < 0 < entry["bias_max"]
        squares = sum(norm**2 for norm in entry["grad_norms"].values())
        assert squares == pytest.approx(entry["grad_norm"] ** 2, rel=1e-5)
        assert entry["bias_speed"] == pytest.approx(1e-3)
    assert [e["learning_rate"] for e in train] == pytest.approx([0.005, 0.01, 0.01, 0.01])
    assert train[-1]["main_loss"] < train[0]["main_loss"] - 1  # it learns
    seconds = [entry["seconds"] for entry in train]
    assert seconds == sorted(seconds)


def test_a_validation_on_the_way_takes_some_rows_and_the_last_one_all(finished: Path):
    first, last = entries(finished, "validation")
    assert (first["rows"], first["whole"]) == (4, False)
    assert last["rows"] > 4
    assert last["whole"] is True
    assert last["bits_per_byte"] < first["bits_per_byte"]


def test_loads_of_all_steps_are_told_once(finished: Path):
    first, last = entries(finished, "experts")
    assert first["layers"] == last["layers"] == ["layers.1", "mtp.0"]
    for entry in (first, last):
        copies = np.array(entry["load_LE"]).sum(-1)
        # 3 steps of 2 rows of 16 tokens with 2 experts each; MTP's last token of a row is none.
        np.testing.assert_array_equal(copies, [3 * 2 * 16 * 2, 3 * 2 * 15 * 2])
    moved = np.abs(np.subtract(last["bias_LE"], first["bias_LE"]))
    assert 0 < moved.max() <= 3 * 1e-3 + 1e-6


def test_time_and_tokens_go_on_counting_after_a_resume(finished: Path):
    before, after = (store.load(finished / "checkpoints", step).meta for step in (4, 6))
    assert 0 < before["seconds"] < after["seconds"]
    last = entries(finished, "train")[-1]
    assert after["seconds"] >= last["seconds"]  # and the end of a save that was under way


def test_the_resolved_configuration_lies_beside_the_run_and_in_every_checkpoint(
    small: SmallRun, finished: Path
):
    written = json.loads((finished / "config.json").read_text())
    assert from_dict(RunConfig, written) == small.cfg
    for step in store.steps(finished / "checkpoints"):
        assert store.load(finished / "checkpoints", step).meta["config"] == written


def test_the_result_is_the_whole_validation_beside_zlib_on_the_same_bytes(
    small: SmallRun, finished: Path
):
    with small.quick():
        built = corpus.build_corpus(small.cfg.data, 300, 0, lambda line: None)
    result = json.loads((finished / "result.json").read_text())
    last = entries(finished, "validation")[-1]
    assert last["rows"] == len(built.validation)
    held_out = text_of(built.validation, built.tokenizer.token_bytes)
    assert result["validation_bytes"] == last["bytes"] == len(held_out)
    assert result["bits_per_byte"] == last["bits_per_byte"]
    assert result["validation_loss"] == last["loss"]
    assert result["zlib_bits_per_byte"] == 8 * len(zlib.compress(held_out, 9)) / len(held_out)
    assert (result["steps"], result["tokens"]) == (6, 6 * 2 * 16)
    assert result["passes"] == 6 * 2 / len(built.train)


def test_a_finished_run_has_all_its_files_and_no_others(finished: Path):
    names = "checkpoints config.json curves.png metrics.jsonl report.html result.json sample.txt"
    assert sorted(path.name for path in finished.iterdir()) == [*names.split(), "tokenizer.json"]
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((finished / "result.json").read_text())
    sample = (finished / "sample.txt").read_bytes().decode()
    assert sample == result["sample_prompt"] + result["sample_text"]
    assert sample.startswith("def ")
    assert len(sample) > len("def ")


# --- resume and stops ---


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
    assert f"run        {run}\n" in shown
    assert "           resumed after step 4\n" in shown
    assert re.search(r"^planned    [\d.]+ MB a device \(.* of workspace$", shown, re.M)
    assert re.search(
        r"^measured   .* of the process at its peak.* alone .*\); [\d,]+ tokens/s$", shown, re.M
    )
    assert store.steps(run / "checkpoints") == [0, 3, 4, 5, 6]
    moved = replace(small.cfg, output=replace(small.cfg.output, folder=str(runs)))
    assert store.load(run / "checkpoints").meta["config"] == json.loads(moved.to_json())
    rewrite_folder(run, finished)
    assert_same_run(run, finished)


def test_a_run_stopped_in_its_last_step_ends_as_the_uninterrupted_one(
    small: SmallRun, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    runs, run = tmp_path / "runs", tmp_path / "runs" / "small-001"
    with monkeypatch.context() as patch:
        send_at_step(patch, 6, signal.SIGTERM)
        assert small.train("--config", small.config, "--output.folder", runs) == 143
    assert store.steps(run / "checkpoints") == [4, 6]
    assert small.train("--resume", run) == 0
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
    assert "planned" not in shown
    assert_same_run(copy, finished)
    assert (copy / "metrics.jsonl").read_text() == (finished / "metrics.jsonl").read_text()


def full_disk(patch: pytest.MonkeyPatch, *steps: int) -> None:
    """There is no room for the arrays of these steps."""
    write = store.write_arrays

    def write_arrays(folder: Path, groups: dict) -> None:
        if any(folder.parent.name.startswith(f"step_{step:08d}") for step in steps):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, groups)

    patch.setattr(store, "write_arrays", write_arrays)


def no_room(step: int, folder: Path, left: str) -> str:
    """What is said then."""
    full = "[Errno 28] No space left on device"
    return f"cannot write checkpoint of step {step} in {folder}: {full}; {left}"


@pytest.mark.parametrize("stopped", [False, True], ids=["last", "signal"])
def test_a_full_disk_ends_a_run_with_one_line_and_leaves_what_was_saved(
    small: SmallRun,
    copy: Path,
    stopped: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    store.delete(copy / "checkpoints", 6)
    (copy / "result.json").unlink()
    full_disk(monkeypatch, 5, 6)
    if stopped:
        send_at_step(monkeypatch, 5, signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        small.train("--resume", copy)
    assert stop.value.code == 2
    said = no_room(5 if stopped else 6, copy / "checkpoints", "the newest checkpoint is of step 4")
    assert capsys.readouterr().err == f"error: {said}\n"
    assert [path.name for path in (copy / "checkpoints").iterdir()] == ["step_00000004"]
    assert (
        copy / "result.json"
    ).exists() is not stopped  # what was trained is measured all the same


def test_a_disk_too_full_for_the_first_checkpoint_of_other_weights_is_one_line(
    small: SmallRun,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    full_disk(monkeypatch, 0)
    with pytest.raises(SystemExit) as stop:
        small.train("--init-from", finished, "--output.folder", tmp_path)
    assert stop.value.code == 2
    folder = tmp_path / "small-001" / "checkpoints"
    assert capsys.readouterr().err == f"error: {no_room(0, folder, 'no checkpoint yet')}\n"
    assert not list(folder.iterdir())


def test_a_disk_that_is_full_on_the_way_is_told_and_training_goes_on(
    small: SmallRun,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    full_disk(monkeypatch, 4)
    often = ("--output.save_every", 2, "--output.folder", tmp_path)
    assert small.train("--config", small.config, *often) == 0
    run = tmp_path / "small-001"
    assert store.steps(run / "checkpoints") == [2, 6]
    (event,) = entries(run, "event")
    said = no_room(4, run / "checkpoints", "the newest checkpoint is of step 2; training goes on")
    assert (event["step"], event["event"], event["text"]) == (4, "not saved", said)
    assert f"\nnot saved: {said}\n" in capsys.readouterr().out
    assert [e for e in timeless(run) if e["kind"] != "event"] == timeless(finished)


# --- parts ---


def test_without_phases_the_cosine_ends_with_the_last_step_whatever_the_batch_was(small: SmallRun):
    """A run of 6 steps that was resumed after 2 steps of 5 rows, and goes on with 2 rows."""
    schedule = replace(
        small.cfg.schedule,
        learning_rate_phases=(),
        warmup_steps=0,
        learning_rate=1.0,
        final_learning_rate=0.0,
    )
    trainer = object.__new__(loop.Trainer)
    trainer.cfg = replace(small.cfg, schedule=schedule)
    rates = []
    for step, rows in ((0, 0), (2, 10), (5, 16), (6, 18)):
        trainer.position = Position(step, rows)
        trainer._count_tokens()
        rates.append(trainer._values().learning_rate)
    shares = 0, 10 / 18, 16 / 18, 1
    expected = [(1 + math.cos(math.pi * share)) / 2 for share in shares]
    assert rates[1:] == pytest.approx(expected[1:], abs=1e-6)
    assert rates[0] == 1.0
