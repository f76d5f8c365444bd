"""What is asked of a model and what it answers, whoever runs it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dsv3_jax.posttrain.problems import Problem

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Ask:
    """One answer to one problem."""

    problem: Problem
    number: int
    """Of the candidate, from 0"""
    seed: int
    """0 to 2^32 - 1: a function of the command's seed, the problem and the number"""


@dataclass(frozen=True)
class Completion:
    """An answer."""

    text: str
    reasoning: str | None = None
    """What stood in <think> ... </think>, or came beside the text; not part of it"""
    cut: bool = False
    """Whether its length ended it"""
    tokens: int | None = None
    """Reasoning included, if the source counts them"""


@dataclass(frozen=True)
class Failure:
    """Why this one cannot be answered: too long a prompt, as a rule."""

    reason: str


class Unavailable(ValueError):
    """A source that gives no more answers; what it gave is kept. One line."""


class Source(Protocol):
    """A model at work."""

    @property
    def described(self) -> Mapping[str, Any]:
        """For the provenance of each sample: `model`, `checkpoint`, `step`, `server`, as far as
        there are."""

    def answers(self, asks: Iterable[Ask]) -> Iterator[tuple[Ask, Completion | Failure]]:
        """Each ask with its answer, in any order, as they come. Unavailable if there are no
        more. `close()` as generators have it: nobody waits for the rest."""


def without_reasoning(text: str) -> tuple[str, str | None]:
    """The answer, and what came before it in <think> ... </think>.

    A template may have opened it already, so that the text has its end alone. Reasoning that never
    ends is all there is: the answer is empty.
    """
    before, closed, after = text.partition(CLOSE)
    begun = before.lstrip().startswith(OPEN)
    if not closed and not begun:
        return text, None
    return after.strip(), before.strip().removeprefix(OPEN).strip()


def with_reasoning(completion: Completion) -> str:
    """The turn of an assistant that thinks aloud, in R1's form."""
    if completion.reasoning is None:
        return completion.text
    return f"{OPEN}\n{completion.reasoning}\n{CLOSE}\n\n{completion.text}"
