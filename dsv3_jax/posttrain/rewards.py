"""Rewards of answers: named, weighted and summed (report 5.2.1).

A reward looks at an attempt and returns a value with its reason. One that raises, hangs or returns
what is no number has failed: its value is then the one that was chosen for failures, the reason is
kept, and the work goes on. Rules stand in `reward_rules`, tests of code in `unit_tests`, rewards by
a model in `model_judge`; here they get their names and are put together.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dsv3_jax.config.fields import check, shown
from dsv3_jax.posttrain.attempts import MOST, Attempt, Rated
from dsv3_jax.posttrain.completions import Source
from dsv3_jax.posttrain.reward_rules import RULES, rule
from dsv3_jax.posttrain.reward_workers import Workers

if TYPE_CHECKING:
    from dsv3_jax.posttrain.code_runner import Runner

Rate = Callable[[Sequence[Attempt]], Sequence[Any]]
NAMES = (
    f"{RULES}, tests, tests:share, judge:reference, judge:score, judge:principles, judge:…:VOTES"
)


@dataclass(frozen=True)
class Reward:
    """One term of the sum."""

    name: str
    rate: Rate
    """Of each attempt, in order: a Rated, a number, or a pair of number and reason"""
    weight: float = 1.0
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Total:
    """Of one attempt."""

    value: float
    """The weighted sum"""
    parts: Mapping[str, Rated]
    """Before their weights, by name"""

    @property
    def failed(self) -> bool:
        """Whether any part is no judgement but a failure."""
        return any(part.failed for part in self.parts.values())


@dataclass(frozen=True)
class Means:
    """What rewards work with; those that are not needed may be missing."""

    runner: "Runner | None" = None
    """For `tests`"""
    judge: Source | None = None
    """For `judge:…`"""
    principles: str | None = None
    """For `judge:principles`; None: those that come with this package"""
    seconds: float = 10.0
    """For one attempt by a rule"""
    judge_seconds: float = 600.0
    """That a judge may be silent"""
    tests_seconds: float = 60.0
    """For all tests of one attempt"""
    workers: int = 2
    """Attempts at the same time"""
    seed: int = 0
    """Of what a judge draws"""

    def check(self) -> None:
        """ValueError, one line."""
        waits = {"--reward-seconds": self.seconds}
        waits |= {name: getattr(self, name) for name in ("judge_seconds", "tests_seconds")}
        for name, seconds in waits.items():
            check(name, seconds, 0 < seconds < 1e6, "above 0, below 1e6")
        check("--reward-workers", self.workers, 1 <= self.workers <= 1024, "1 to 1024")


@dataclass(frozen=True)
class Rewards:
    """A weighted sum; a context manager, since rules have processes of their own."""

    terms: Sequence[Reward]
    failed: float = 0.0
    """Value of a part that failed"""

    def rate(self, attempts: Sequence[Attempt]) -> list[Total]:
        """In order. Raises for nothing that a reward does."""
        columns = {term.name: self._column(term, attempts) for term in self.terms}
        weights = {term.name: term.weight for term in self.terms}
        totals = []
        for place in range(len(attempts)):
            parts = {name: column[place] for name, column in columns.items()}
            value = math.fsum(weights[name] * part.value for name, part in parts.items())
            totals.append(Total(value, parts))
        return totals

    def _column(self, term: Reward, attempts: Sequence[Attempt]) -> list[Rated]:
        if not attempts:
            return []
        try:
            said = list(term.rate(attempts))
            if len(said) != len(attempts):
                raise ValueError(f"{len(said)} values for {len(attempts)} attempts")
        except Exception as error:  # a plug-in may raise anything
            said = [Rated.failure(error)] * len(attempts)
        rated = map(Rated.of, said)
        return [replace(one, value=self.failed) if one.failed else one for one in rated]

    def close(self) -> None:
        """Ends what rewards have started."""
        for term in self.terms:
            term.close()

    def __enter__(self) -> "Rewards":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def rewards(specs: Sequence[str], means: Means | None = None, failed: float = 0.0) -> Rewards:
    """Of `--reward` options: each a name, or a name, `*` and its weight (`boxed*2`); without one
    it is 1. A `*` that belongs to the name, as a pattern's may, needs a weight behind it.

    ValueError, one line, for an unknown name, a name twice, a weight that is no number, and for
    what a reward needs and `means` lack.
    """
    means = means or Means()
    means.check()
    check("--reward-failed", failed, abs(failed) <= MOST, f"at most {MOST:g} in size")
    named: dict[str, float] = {}
    for spec in specs:
        name, weight = _weighted(spec)
        if name in named:
            raise ValueError(f"--reward {shown(name)} stands there twice")
        named[name] = weight
    if not named:
        raise ValueError(f"--reward is missing; allowed: one or more of {NAMES}")
    return Rewards([_reward(name, weight, means) for name, weight in named.items()], failed)


_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")


def _weighted(spec: str) -> tuple[str, float]:
    name, separator, weight = spec.rpartition("*")
    if not separator:
        return spec, 1.0
    if not (name and _NUMBER.fullmatch(weight) and abs(float(weight)) <= MOST):
        raise ValueError(
            f"--reward is {shown(spec)}; allowed: NAME or NAME*WEIGHT, the weight a number of at "
            f"most {MOST:g} in size"
        )
    return name, float(weight)


def _reward(name: str, weight: float, means: Means) -> Reward:
    what, _, argument = name.partition(":")
    try:
        if what == "tests":
            return Reward(name, _tests(argument, means), weight)
        if what == "judge":
            return Reward(name, _judge(argument, means), weight)
        rule(name, NAMES)
    except ValueError as error:
        raise ValueError(f"--reward {shown(name)}: {error}") from None
    workers = Workers(name, means.seconds, means.workers)
    return Reward(name, workers.rate, weight, workers.close)


def _tests(argument: str, means: Means) -> Rate:
    from dsv3_jax.posttrain.unit_tests import UnitTests

    if argument not in ("", "share"):
        raise ValueError("allowed: tests, tests:share")
    if means.runner is None:
        raise ValueError("no runner of code is given")
    return UnitTests(means.runner, argument == "share", means.tests_seconds, means.workers).rate


def _judge(argument: str, means: Means) -> Rate:
    from dsv3_jax.posttrain.model_judge import JUDGES, ModelJudge

    name, separator, votes = argument.partition(":")
    if name not in JUDGES or (separator and not re.fullmatch(r"[1-9]\d{0,2}", votes)):
        raise ValueError(f"allowed: judge:NAME or judge:NAME:VOTES, of {', '.join(JUDGES)}")
    if means.judge is None:
        raise ValueError("no judge is given: a model that is served, or a checkpoint")
    judge = ModelJudge(
        means.judge, name, int(votes or 1), means.seed, means.judge_seconds, means.principles
    )
    return judge.rate
