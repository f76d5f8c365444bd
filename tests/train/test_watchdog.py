"""A step that hangs is told once, with where it is; one that does not is not."""

import time
from types import SimpleNamespace

from dsv3_jax.train import watchdog
from dsv3_jax.train.watchdog import Watchdog


def until(said: list[str]) -> None:
    end = time.monotonic() + 5
    while not said and time.monotonic() < end:
        time.sleep(0.005)


def test_a_hanging_step_is_told_once_and_where_it_is():
    said, where = [], ["reading rows"]
    dog = Watchdog(said.append, lambda: where[0], limit=0.05)
    dog.begin(1)
    dog.end()
    time.sleep(0.1)
    assert said == []
    where[0] = "stage 3, micro-batch 7, F"
    dog.begin(2)
    until(said)
    time.sleep(0.1)
    dog.close()
    (line,) = said
    assert line.startswith("step 2 hangs, 0 s so far: stage 3, micro-batch 7, F; wait, or stop")


def test_of_two_steps_under_way_the_older_one_is_watched(monkeypatch):
    """The other one's time begins when that has ended; what is void is not watched."""
    clock = [0.0]
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    dog = Watchdog(print, str, limit=100.0)
    dog.begin(1)
    clock[0] = 3.0
    dog.begin(2)
    assert dog._steps[0] == (1, 0.0)
    clock[0] = 5.0
    dog.end()
    assert list(dog._steps) == [(2, 5.0)]
    assert list(dog._durations) == [5.0]
    dog.forget()
    assert not dog._steps
    dog.close()


def test_the_limit_follows_the_usual_step(monkeypatch):
    monkeypatch.setattr(watchdog, "LEAST_SECONDS", 1.0)
    dog = Watchdog(print, str)
    assert dog.limit == watchdog.FIRST_SECONDS
    dog._durations.append(0.01)
    assert dog.limit == 1.0
    dog._durations.clear()
    dog._durations.extend([0.1, 2.0, 30.0])
    assert dog.limit == 40.0
    dog.close()


def test_processes_are_told_together(monkeypatch):
    """Of three, the third does not even answer."""
    monkeypatch.setattr(watchdog, "REPLY_SECONDS", 0.01)
    monkeypatch.setattr(watchdog.processes, "count", lambda: 3)
    posts = {1: "4 computing"}
    monkeypatch.setattr(watchdog.processes, "post", lambda _, word: posts.update({0: word}))
    monkeypatch.setattr(watchdog.processes, "posted", lambda _, number: posts.get(number))
    said: list[str] = []
    dog = Watchdog(said.append, lambda: "computing", limit=0.02)
    dog.begin(4)
    until(said)
    dog.close()
    assert "processes 0, 1: computing; process 2: no answer, so others wait for it" in said[0]
