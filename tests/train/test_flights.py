"""Runs with a step in flight, in the order of an accelerator: what they write is as of runs that
wait for each step, and nothing is saved that nobody has looked at.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from dsv3_jax.checkpoint import store
from dsv3_jax.config import Phase
from dsv3_jax.train import loop
from dsv3_jax.train.feed import RowFeed
from dsv3_jax.train.loop import Trainer
from dsv3_jax.train.metrics import read_metrics
from tests.runs import SmallRun, assert_same_checkpoint, spike_at, timeless, write_config


@pytest.fixture(autouse=True)
def in_flight(finished: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """For each step whether its program is made first, and how many were in flight before it. The
    finished run waited for each.
    """
    monkeypatch.setattr(loop, "WAITED_FOR", ())
    launch, noted = Trainer._launch, []

    def hooked(self: Trainer) -> None:
        noted.append((self._values().rows not in self.programs, len(self.flights)))
        launch(self)

    monkeypatch.setattr(Trainer, "_launch", hooked)
    return noted


def test_what_is_written_is_the_same(
    small: SmallRun, finished: Path, tmp_path: Path, in_flight: list
):
    assert small.train("--config", small.config, "--output.folder", tmp_path) == 0
    # None behind the validation after 3 and the checkpoint after 4.
    assert [count for _, count in in_flight] == [0, 1, 1, 0, 0, 1]
    run = tmp_path / "small-001"
    assert timeless(run) == timeless(finished)
    for step in (4, 6):
        one, two = (store.load(path / "checkpoints", step) for path in (run, finished))
        one.meta["config"] = two.meta["config"]
        store.save(run / "checkpoints", step, one.arrays, one.meta)
        assert_same_checkpoint(run, finished, step)


def test_what_was_launched_before_a_run_goes_back_is_void(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_flight: list
):
    """The spike is of step 6, and 7 is in flight when that is seen; both are traced, once."""
    traces: list = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *args, **_: traces.extend(args))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: traces.append(len(in_flight)))
    output = replace(small.cfg.output, folder=str(tmp_path), eval_every=20)
    train = replace(small.cfg.train, steps=8, spike="rewind")
    write_config(tmp_path / "spiky.py", replace(small.cfg, train=train, output=output))
    spike_at(monkeypatch, [6])
    assert small.train("--config", tmp_path / "spiky.py", "--profile", "5:8") == 0
    assert traces == [tmp_path / "small-001" / "profile", 11]  # until the last of what follows
    # 1 to 7, back, then 5 to 8 with the rows after those of the spike.
    assert [count for _, count in in_flight] == [0, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1]
    meta = store.load(tmp_path / "small-001" / "checkpoints").meta
    assert (meta["step"], meta["consumed_rows"], meta["updates"]) == (8, 20, 8)
    entries = read_metrics(tmp_path / "small-001" / "metrics.jsonl")
    logged = [entry["step"] for entry in entries if entry["kind"] == "train"]
    assert logged == [1, 2, 4, 6, 6, 8]


def unread(batch: int) -> Callable:
    """Reading this batch of a process fails."""
    read, asked = RowFeed.batch, []

    def failing(self, *args):
        asked.append(args)
        if len(asked) == batch:
            raise OSError("shard 3 cannot be read")
        return read(self, *args)

    return failing


def test_where_data_end_the_step_in_flight_is_told_and_saved(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, in_flight: list
):
    monkeypatch.setattr(RowFeed, "batch", unread(3))
    with pytest.raises(SystemExit) as stop:
        small.train("--config", small.config, "--output.folder", tmp_path)
    assert stop.value.code == 2
    assert "shard 3 cannot be read" in capsys.readouterr().err
    assert in_flight[-1] == (False, 1)
    run = tmp_path / "small-001"
    assert store.steps(run / "checkpoints") == [2]
    entries = read_metrics(run / "metrics.jsonl")
    assert [entry["step"] for entry in entries if entry["kind"] == "train"] == [1, 2]


def test_a_step_in_flight_is_saved_where_the_one_before_cannot_be_told(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_flight: list
):
    """Nor itself, then: the disk that holds the log is full."""

    def full(*_: object, **__: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(loop, "train_record", full)
    with pytest.raises(SystemExit) as stop:
        small.train("--config", small.config, "--output.folder", tmp_path)
    assert (stop.value.code, len(in_flight)) == (2, 2)
    assert store.steps(tmp_path / "small-001" / "checkpoints") == [2]


def test_unless_that_step_has_spoilt_the_weights(
    small: SmallRun, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    run = Path(shutil.copytree(finished, tmp_path / "small-001"))
    checkpoint = store.load(run / "checkpoints")
    for name, mu in checkpoint.arrays["mu"].items():  # finite, and the update is not
        checkpoint.arrays["mu"][name] = np.full_like(mu, 3e38)
    store.save(run / "checkpoints", 6, checkpoint.arrays, checkpoint.meta)
    monkeypatch.setattr(RowFeed, "batch", unread(2))
    assert small.train("--resume", run, "--train.steps", 9) == 3
    assert "the weights are not finite after update 7" in capsys.readouterr().out
    assert store.steps(run / "checkpoints") == [4, 6]


@pytest.mark.slow
def test_nothing_is_in_flight_while_the_next_stair_of_a_ramp_is_compiled(
    small: SmallRun, tmp_path: Path, in_flight: list
):
    schedule = replace(small.cfg.schedule, rows_phases=(Phase(0, 70, 2), Phase(70, 10**6, 4)))
    train = replace(small.cfg.train, rows=4, microbatches=2)
    output = replace(small.cfg.output, folder=str(tmp_path), eval_every=20, save_every=20)
    cfg = replace(small.cfg, schedule=schedule, train=train, output=output)
    write_config(tmp_path / "ramp.py", cfg)
    assert small.train("--config", tmp_path / "ramp.py") == 0
    assert in_flight == [
        (False, 0),
        (False, 1),
        (False, 1),
        (True, 0),
        (False, 1),
        (False, 1),
    ]
