"""Speed and waiting of the last steps, pauses left out."""

import time

import pytest

from dsv3_jax.train.clock import Clock


def test_speed_counts_the_last_steps_without_pauses(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock(rows=50, seconds=30.0)
    for step in range(6, 10):  # 2 s a step of ten rows, half of it waiting for them
        with clock.waiting():
            now += 1
        now += 1
        clock.mark(10 * step)
        assert clock.rows_per_second() == pytest.approx(5)
        assert clock.data_wait() == pytest.approx(0.5)
    with clock.paused():
        now += 1000
        assert clock.seconds() == pytest.approx(38.0)  # what a checkpoint in the pause says
    now += 2
    clock.mark(100)
    assert clock.rows_per_second() == pytest.approx(5)
    assert clock.data_wait() == pytest.approx(0.4)
    assert clock.seconds() == pytest.approx(40.0)
    for step in range(11, 40):  # faster now, and the slow steps are forgotten
        now += 1
        clock.mark(10 * step)
    assert clock.rows_per_second() == pytest.approx(10)
    assert clock.data_wait() == 0
