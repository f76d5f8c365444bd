"""Processes in which rules rate attempts, one at a time each, so that one that hangs can be ended.

A pattern that backtracks without end holds Python's lock: no thread beside it would ever run. A
worker that takes too long, or that dies, is replaced, and its attempt has failed.
"""

import contextlib
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO, Any

from dsv3_jax.posttrain.attempts import Attempt, Rated

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from dsv3_jax.posttrain.reward_workers import work; work(sys.argv[2], float(sys.argv[3]))"
)
_START_SECONDS = 120.0  # to import what a rule imports
_ORPHAN_SECONDS = 30  # after its time, a worker whose parent has died ends by an alarm


class Workers:
    """Of one rule. `rate` is for one thread at a time."""

    def __init__(self, name: str, seconds: float, count: int) -> None:
        """`seconds` for each attempt, in `count` processes; they start with the first attempts."""
        self._name, self._seconds = name, seconds
        self._workers: list[_Worker | None] = [None] * count

    def rate(self, attempts: Sequence[Attempt]) -> list[Rated]:
        """In order."""
        waiting: queue.SimpleQueue = queue.SimpleQueue()
        for place in range(len(attempts)):
            waiting.put(place)
        rated: list[Any] = [Rated.failure("not rated")] * len(attempts)

        def run(number: int) -> None:
            while True:
                try:
                    place = waiting.get_nowait()
                except queue.Empty:
                    return
                worker = self._workers[number]
                if worker is None or not worker.alive:
                    worker = self._workers[number] = _Worker(self._name, self._seconds)
                rated[place] = worker.rate(attempts[place])

        threads = [
            threading.Thread(target=run, args=(number,), daemon=True)
            for number in range(min(len(self._workers), len(attempts)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return rated

    def close(self) -> None:
        """Ends the processes."""
        for number, worker in enumerate(self._workers):
            if worker is not None and worker.alive:
                worker.end()
            self._workers[number] = None


class _Worker:
    def __init__(self, name: str, seconds: float) -> None:
        self._seconds, self._text, self._ready = seconds, b"", False
        arguments = [json.dumps(["", *sys.path]), name, str(seconds)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.alive = True

    def rate(self, attempt: Attempt) -> Rated:
        try:
            if not self._ready:
                self._ready = self._reply(_START_SECONDS)["ready"]
            self._process.stdin.write(json.dumps(attempt.to_json()).encode() + b"\n")
            self._process.stdin.flush()
            return Rated(**self._reply(self._seconds))
        except TimeoutError:
            self.end()
            return Rated.failure(f"took longer than {self._seconds:g} s")
        except (OSError, ValueError, TypeError, LookupError) as error:
            self.end()
            ended = self._process.returncode
            why = f"its process ended with {ended}" if isinstance(error, OSError) else error
            return Rated.failure(why)

    def _reply(self, seconds: float) -> dict[str, Any]:
        """A line. TimeoutError without one; BrokenPipeError if the process has ended."""
        end = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._text:
                if not selector.select(max(end - time.monotonic(), 0)):
                    raise TimeoutError
                data = os.read(self._process.stdout.fileno(), 1 << 16)
                if not data:
                    self._process.wait()
                    raise BrokenPipeError
                self._text += data
        line, _, self._text = self._text.partition(b"\n")
        return json.loads(line)

    def end(self) -> None:
        """With all that it has started."""
        self.alive = False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(OSError):  # what was still to be written
            self._process.stdin.close()
        self._process.stdout.close()


def work(name: str, seconds: float) -> None:
    """In the worker: rates a line of JSON after another, until there is none. What a rule prints
    goes to stderr.
    """
    from dsv3_jax.posttrain.reward_rules import rule

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    rate = rule(name)
    _say(replies, {"ready": True})
    for line in sys.stdin:
        attempt = Attempt(**json.loads(line))
        signal.alarm(int(seconds) + _ORPHAN_SECONDS)
        try:
            rated = Rated.of(rate(attempt))
        except Exception as error:  # a function of the user's may raise anything
            rated = Rated.failure(error)
        signal.alarm(0)
        _say(replies, {"value": rated.value, "reason": rated.reason, "failed": rated.failed})


def _say(replies: IO[str], what: dict[str, Any]) -> None:
    replies.write(json.dumps(what) + "\n")
    replies.flush()
