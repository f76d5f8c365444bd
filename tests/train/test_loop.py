"""What a run records and when, and how it hears that it shall stop."""

import signal
import time
from pathlib import Path

import pytest

from dsv3_jax.checkpoint import store
from dsv3_jax.train import loop
from dsv3_jax.train.metrics import read_metrics
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
    clock = loop._Clock(step=5)
    for step in range(6, 10):  # 2 s a step
        now += 2
        assert clock.rate(step) == pytest.approx(0.5)
    with clock.paused():
        now += 1000
    now += 2
    assert clock.rate(10) == pytest.approx(0.5)
    assert clock.seconds() == pytest.approx(10)
    for step in range(11, 40):  # faster now, and the slow steps are forgotten
        now += 1
        rate = clock.rate(step)
    assert rate == pytest.approx(1)


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
