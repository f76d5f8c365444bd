"""A word when a step hangs: which process, which step, where it is, and what to do.

A thread looks at the clock while a step runs; compiling, validating and saving do not count. In
several processes each posts where it hangs, so that the first one, which alone is seen, can tell
who is late: the others wait for it.
"""

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from dsv3_jax.parallel import processes

USUAL_STEPS = 20  # a step hangs that takes so many usual ones
LEAST_SECONDS = 120.0  # and at least this long: a laptop sleeps, a disk is slow
FIRST_SECONDS = 1200.0  # a pipeline's first step compiles what is around its passes
REPLY_SECONDS = 2.0  # for the other processes to see that they hang, too
_TOPIC = "hangs"


class _Step(NamedTuple):
    number: int
    since: float


class Watchdog:
    """Of one run. `close` ends its thread."""

    def __init__(
        self, say: Callable[[str], None], where: Callable[[], str], limit: float = 0.0
    ) -> None:
        """`where` says what this process is doing now, whenever it is asked, from another thread.
        `limit` in seconds; 0: `USUAL_STEPS` times the median of the last steps, at least
        `LEAST_SECONDS`, and `FIRST_SECONDS` for the first one.
        """
        self._say, self._where, self._limit = say, where, limit
        self._durations: deque[float] = deque(maxlen=50)
        self._steps: deque[_Step] = deque()  # an accelerator has the next one already
        self._told = -1
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def begin(self, step: int) -> None:
        """A step starts to run, or will when those before it have ended."""
        self._steps.append(_Step(step, time.monotonic()))

    def end(self) -> None:
        """The oldest one has ended."""
        now = time.monotonic()
        self._durations.append(now - self._steps.popleft().since)
        if self._steps:
            self._steps[0] = self._steps[0]._replace(since=now)

    def forget(self) -> None:
        """Steps under way are void."""
        self._steps.clear()

    def close(self) -> None:
        """No more looking."""
        self._closed.set()
        self._thread.join()

    @property
    def limit(self) -> float:
        """Seconds after which a step hangs."""
        if self._limit:
            return self._limit
        if not self._durations:
            return FIRST_SECONDS
        return max(LEAST_SECONDS, USUAL_STEPS * statistics.median(self._durations))

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, max(0.05, self.limit / 4))):
            step = next(iter(list(self._steps)), None)
            if step and step.number != self._told and time.monotonic() - step.since > self.limit:
                self._told = step.number
                self._tell(step)

    def _tell(self, step: _Step) -> None:
        where = self._where()
        processes.post(_TOPIC, f"{step.number} {where}")
        if processes.count() > 1 and self._closed.wait(REPLY_SECONDS):
            return
        seconds = time.monotonic() - step.since
        self._say(
            f"step {step.number} hangs, {seconds:,.0f} s so far: {self._all(step, where)}; wait, "
            "or stop the run and go on with --resume (launch.hang_seconds sets the limit)"
        )

    def _all(self, step: _Step, where: str) -> str:
        """Where each process is, alike ones together."""
        if processes.count() == 1:
            return where
        found: dict[str, list[int]] = {}
        for number in range(processes.count()):
            said, _, there = (processes.posted(_TOPIC, number) or "").partition(" ")
            answer = there if said == str(step.number) else "no answer, so others wait for it"
            found.setdefault(answer, []).append(number)
        return "; ".join(
            f"process{'es' * (len(numbers) > 1)} {', '.join(map(str, numbers))}: {answer}"
            for answer, numbers in found.items()
        )
