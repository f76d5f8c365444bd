"""Contenders side by side: each in a process of its own, warmed up, and then by turns.

Turns, since other work on a machine slows down whoever runs at the time: in alternating rounds it
meets all alike, and ratios hold where seconds do not. In two phases, so that slow contenders do
not take most of the time: a few qualifying rounds find the fastest of each group of rivals, and
only these go on. Needs Linux, whose /proc tells peak memory.
"""

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dsv3_jax.process import SETTINGS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

Allocator = Literal["tuned", "default"]

TOO_SLOW = 20.0  # seconds of a turn above which a rival stays in the qualifying rounds


def environment(allocator: Allocator) -> dict[str, str]:
    """This process's variables with these allocator settings and no others."""
    inherited = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return {**inherited, "PYTHONPATH": str(ROOT), **(SETTINGS if allocator == "tuned" else {})}


def check_interpreters(paths: Iterable[str]) -> None:
    """ValueError names the first where nothing can be run."""
    for path in paths:
        if shutil.which(path) is None:
            raise ValueError(f"interpreter {path!r}; allowed: the path of a Python interpreter")


def tell(line: str) -> None:
    """Progress, on stderr: stdout is for the table."""
    print(line, file=sys.stderr, flush=True)


@dataclass
class Contender:
    """A process that answers as answering.py does, and what it has answered."""

    name: str
    group: str
    """Only those of one group do the same work"""
    python: str
    script: str
    options: dict[str, Any]
    tokens: int
    """Of one turn"""
    environment: dict[str, str] = field(default_factory=lambda: environment("tuned"))
    facts: dict[str, Any] = field(default_factory=dict)
    qualifying: list[float] = field(default_factory=list)
    """Seconds of turns in the qualifying rounds"""
    seconds: list[float] = field(default_factory=list)
    """Seconds of turns after them"""
    waits: list[float] = field(default_factory=list)
    """Mean seconds that a request took in each turn, where requests are served"""
    loads: list[list[dict[str, Any]]] = field(default_factory=list)
    """What each turn told of each of its loads, as of loads.py, where there are some"""
    peak_bytes: int = 0
    """Highest resident memory over all turns"""
    is_baseline: bool = False
    """The fastest of its rivals"""
    process: subprocess.Popen | None = None
    folder: tempfile.TemporaryDirectory | None = None
    """Holds what it writes to stderr: in a pipe that nobody reads, much of it would block"""

    def start(self) -> bool:
        """Starts it and waits for its warm-up. False, with its last words on stderr, if it ends."""
        self.folder = tempfile.TemporaryDirectory()
        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                [self.python, str(HERE / self.script), json.dumps(self.options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=self.environment,
            )
        self.facts = self._answer() or {}
        return bool(self.facts)

    def turn(self) -> bool:
        """Runs its work once. False if it ends instead."""
        with contextlib.suppress(BrokenPipeError):  # ended; its last words tell why
            print("go", file=self.process.stdin, flush=True)
        answer = self._answer()
        if answer is None:
            return False
        self.seconds.append(answer["seconds"])
        self.waits += [answer["wait"]] if "wait" in answer else []
        self.loads += [answer["loads"]] if "loads" in answer else []
        self.peak_bytes = max(self.peak_bytes, answer["peak_bytes"])
        return True

    def _answer(self) -> dict[str, Any] | None:
        """Its next line of JSON; libraries may print others. None if it has ended."""
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.process.wait()
        said = self._errors.read_text(errors="replace").strip().splitlines()
        said = said or [f"exit {self.process.returncode}"]
        tell(f"{self.group}: {self.name} does not run: {said[-1]}")
        return None

    @property
    def _errors(self) -> Path:
        return Path(self.folder.name, "stderr")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.folder.cleanup()
            self.process = None


@contextlib.contextmanager
def started(contenders: Iterable[Contender]) -> Iterator[list[Contender]]:
    """Those that run at all, started one after the other; all are stopped at the end."""
    running = []
    try:
        for contender in contenders:
            tell(f"starting {contender.group}: {contender.name}")
            running.append(contender)
            if not contender.start():
                contender.stop()
                running.remove(contender)
        yield running
    finally:
        for contender in running:
            contender.stop()


def take_turns(running: Sequence[Contender], rounds: int) -> list[Contender]:
    """Runs them by turns, every round beginning with another one. Returns those still running."""
    running = list(running)
    for i in range(rounds):
        tell(f"round {i + 1} of {rounds}")
        for k in range(len(running)):
            contender = running[(i + k) % len(running)]
            if contender.process and not contender.turn():
                contender.stop()
    return [contender for contender in running if contender.process]


def contest(
    ours: Sequence[Contender],
    rivals: Sequence[Sequence[Contender]],
    *,
    qualify: int,
    rounds: int,
) -> list[Contender]:
    """Both phases. Of each group of rivals, the fastest in the qualifying rounds is its baseline.

    Returns all that ran, ours first; of the baselines, those too slow for more have no `seconds`
    but of the qualifying rounds.
    """
    with contextlib.ExitStack() as stack:
        ran, finalists = [], []
        for group in rivals:
            qualified = take_turns(stack.enter_context(started(group)), qualify)
            for contender in qualified:
                contender.qualifying, contender.seconds = contender.seconds, []
            ran += qualified
            finalists += _finalists(qualified)
        running = stack.enter_context(started(ours))
        take_turns([*running, *finalists], rounds)
        return [c for c in [*running, *ran] if c.seconds or c.qualifying]


def _finalists(qualified: Sequence[Contender]) -> list[Contender]:
    """The fastest, named the baseline, unless it is too slow; the others are stopped."""
    if not qualified:
        return []
    fastest = min(qualified, key=lambda contender: statistics.median(contender.qualifying))
    fastest.is_baseline = True
    goes_on = statistics.median(fastest.qualifying) <= TOO_SLOW
    for contender in qualified:
        if contender is not fastest or not goes_on:
            contender.stop()
    return [fastest] if goes_on else []
