"""What generation has done so far, and how long it took."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass
class Statistics:
    """Counts and seconds since an engine, or one text, began."""

    requests: int = 0
    """That have ended, those cancelled or handed over included"""
    read: int = 0
    """Tokens of prompts read, those read again for texts that gave up their pages included"""
    borrowed: int = 0
    """Tokens of prompts that need not be read, for another text began alike"""
    written: int = 0
    """Tokens of answers"""
    steps: int = 0
    """Steps of texts: two texts that go on by one make two"""
    stepped: int = 0
    """Tokens that steps brought; the first one of an answer comes from reading its prompt"""
    gave_up: int = 0
    """Times that a text had to give up its pages and wait again"""
    offered: list[int] = field(default_factory=list)
    """Drafts looked at, of the first module, the second ...; those behind a wrong one are not"""
    accepted: list[int] = field(default_factory=list)
    """Of these, the ones that stayed"""
    reading: float = 0.0
    """Seconds"""
    going_on: float = 0.0
    """Seconds"""
    compiling: float = 0.0
    """Seconds, in none of the others"""

    @contextlib.contextmanager
    def measured(self, what: str) -> Iterator[Callable[[], float]]:
        """Adds the seconds of the block, without what is compiled in it, to a field; yields a
        function that tells them.
        """
        begun, compiling = time.perf_counter(), self.compiling

        def seconds() -> float:
            return time.perf_counter() - begun - (self.compiling - compiling)

        yield seconds
        setattr(self, what, getattr(self, what) + seconds())

    def step(self, allowed: int, taken: int) -> None:
        """One text's, which could take so many drafts and took `taken` tokens."""
        self.steps += 1
        self.stepped += taken
        for k in range(min(allowed, taken)):
            self.offered[k] += 1
            self.accepted[k] += taken > k + 1

    @property
    def tokens(self) -> int:
        """That have passed the model, drafts aside."""
        return self.read + self.steps

    @property
    def accepted_a_step(self) -> float | None:
        """Drafts that stayed in a step of a text, on the average; None where there are none."""
        return sum(self.accepted) / self.steps if self.offered and self.steps else None

    @property
    def acceptance(self) -> list[float | None]:
        """Share of accepted drafts by module; None where none was looked at."""
        pairs = zip(self.accepted, self.offered, strict=True)
        return [accepted / offered if offered else None for accepted, offered in pairs]
