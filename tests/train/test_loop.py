"""What a run records and when, and how it hears that it shall stop."""

import math
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.checkpoint import store
from dsv3_jax.train import loop
from dsv3_jax.train.metrics import read_metrics
from dsv3_jax.train.snapshot import Position
from tests.runs import TIMES, SmallRun, timeless


def entries(run: Path, kind: str) -> list[dict]:
    return [entry for entry in read_metrics(run / "metrics.jsonl") if entry["kind"] == kind]


def test_a_run_logs_validates_and_saves_at_the_steps_it_was_told(finished: Path):
    train, validation = entries(finished, "train"), entries(finished, "validation")
    assert [entry["step"] for entry in train] == [1, 2, 4, 6]  # every 2, the first and the last
    assert [entry["step"] for entry in validation] == [3, 6]  # every 3, and the end
    assert store.steps(finished / "checkpoints") == [4, 6]  # every 4, and the end
    order = [(entry["step"], entry["kind"]) for entry in timeless(finished)]
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


def test_speed_counts_the_last_steps_without_pauses(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = loop._Clock(Position(step=5, seconds=30.0))
    for step in range(6, 10):  # 2 s a step
        now += 2
        assert clock.rate(step) == pytest.approx(0.5)
    with clock.paused():
        now += 1000
    now += 2
    assert clock.rate(10) == pytest.approx(0.5)
    assert clock.stamped(Position(10, 20)) == Position(10, 20, pytest.approx(40.0))
    for step in range(11, 40):  # faster now, and the slow steps are forgotten
        now += 1
        rate = clock.rate(step)
    assert rate == pytest.approx(1)


def test_time_and_tokens_go_on_counting_after_a_resume(finished: Path):
    before, after = (store.load(finished / "checkpoints", step).meta for step in (4, 6))
    assert 0 < before["seconds"] < after["seconds"]
    last = entries(finished, "train")[-1]
    assert after["seconds"] == pytest.approx(last["seconds"], rel=0.1)


def test_without_phases_the_cosine_ends_with_the_last_step_whatever_the_batch_was(small: SmallRun):
    """A run of 6 steps that was resumed after 2 steps of 5 rows, and goes on with 2 rows."""
    schedule = replace(
        small.cfg.schedule, phases=(), warmup_steps=0, learning_rate=1.0, final_learning_rate=0.0
    )
    trainer = object.__new__(loop.Trainer)
    trainer.cfg = replace(small.cfg, schedule=schedule)
    rates = [
        float(trainer.coefficients(Position(step, rows)).learning_rate)
        for step, rows in ((0, 0), (2, 10), (5, 16), (6, 18))
    ]
    shares = 0, 10 / 18, 16 / 18, 1
    expected = [(1 + math.cos(math.pi * share)) / 2 for share in shares]
    assert rates[1:] == pytest.approx(expected[1:], abs=1e-6)
    assert rates[0] == 1.0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, []),
        ({"schedule": {"mtp_weight": 0.0}}, ["schedule.mtp_weight is 0"]),
        ({"schedule": {"bias_speed": 0.0}}, ["schedule.bias_speed is 0"]),
        ({"train": {"balance_weight": 0.0}}, ["train.balance_weight is 0"]),
        ({"schedule": {"mtp_weight": 0.0}, "model": {"mtp_depth": 0}}, []),
    ],
)
def test_what_is_switched_off_is_told(small: SmallRun, changes: dict, told: list[str]):
    sections = {name: replace(getattr(small.cfg, name), **c) for name, c in changes.items()}
    metrics = SimpleNamespace(silent=nnx.State({}))
    assert loop.warnings_of(replace(small.cfg, **sections), metrics) == told


def test_parameters_without_a_gradient_are_named(small: SmallRun):
    flags = {"a": True, "b": False, "moe_layers": {"w": True}}
    silent = nnx.State(jax.tree.map(lambda x: nnx.Param(np.array(x)), flags))
    silent["moe_layers"]["w"] = nnx.Param(np.array([True, False]))
    told = loop.warnings_of(small.cfg, SimpleNamespace(silent=silent))
    assert told == ["no gradient reaches 2 of 4 parameters: a, layers.1.w"]


def test_a_first_signal_is_noted_and_a_second_one_acts_as_ever():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with loop._stop_signals() as came:
            signal.raise_signal(signal.SIGTERM)
            assert (came, heard) == ([signal.SIGTERM], [])
            signal.raise_signal(signal.SIGTERM)
            assert (came, heard) == ([signal.SIGTERM], [signal.SIGTERM])
            signal.raise_signal(signal.SIGINT)
            assert came == [signal.SIGTERM, signal.SIGINT]
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert len(came) == 2  # nobody listens any more
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
