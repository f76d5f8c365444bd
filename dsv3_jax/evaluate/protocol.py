"""The report's evaluation protocol as code (report 4.4.1, 5.3.1).

Base models: some benchmarks are scored by perplexity, the likeliest of given answers, the others by
what the model writes; Pile-test in bits per byte; gaps of at most 0.3 count as equal. Chat models:
answers of at most 8,192 tokens; sets of fewer than 1,000 samples run several times at several
temperatures, of which the report gives the mean. Which temperatures is unpublished, but for AIME
and CNMO (0.7, mean of 16): the defaults here are ours.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dsv3_jax.data.hashing import key64

Scoring = Literal["perplexity", "generation"]

CHAT_TOKENS = 8192
"""Most tokens of a chat model's answer"""
SMALL_SET = 1000
"""Sets of fewer samples run several times"""
CHAT_TEMPERATURES = (0.3, 0.6, 0.9)
"""Of small sets"""
EQUAL_GAP = 0.3
"""Points of 100 within which two base models count as equal"""

BY_PERPLEXITY = (
    "HellaSwag, PIQA, WinoGrande, RACE-Middle, RACE-High, MMLU, MMLU-Redux, MMLU-Pro, MMMLU, "
    "ARC-Easy, ARC-Challenge, C-Eval, CMMLU, C3, CCPM"
).split(", ")
BY_GENERATION = (
    "TriviaQA, NaturalQuestions, DROP, MATH, GSM8K, MGSM, HumanEval, MBPP, LiveCodeBench-Base, "
    "CRUXEval, BBH, AGIEval, CLUEWSC, CMRC, CMath"
).split(", ")
# lm-eval's names, without the subjects, languages and prompts behind them. The longest counts.
_NAMES = {
    "hellaswag": "HellaSwag",
    "piqa": "PIQA",
    "winogrande": "WinoGrande",
    "race": "RACE-High",
    "mmlu": "MMLU",
    "mmlu_redux": "MMLU-Redux",
    "mmlu_pro": "MMLU-Pro",
    "mmmlu": "MMMLU",
    "openai_mmlu": "MMMLU",
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "ceval": "C-Eval",
    "cmmlu": "CMMLU",
    "triviaqa": "TriviaQA",
    "nq_open": "NaturalQuestions",
    "drop": "DROP",
    "hendrycks_math": "MATH",
    "minerva_math": "MATH",
    "gsm8k": "GSM8K",
    "mgsm": "MGSM",
    "humaneval": "HumanEval",
    "mbpp": "MBPP",
    "bbh": "BBH",
    "agieval": "AGIEval",
}


@dataclass(frozen=True)
class Wish:
    """What of lm-eval's tasks runs, and how."""

    names: tuple[str, ...]
    include_path: Path | None = None
    """A folder with further task files"""
    limit: int | None = None
    """Samples of each set, the first ones"""
    shots: int | None = None
    """Examples before a question, instead of a task's own number"""
    chat: bool = False
    temperatures: tuple[float, ...] = ()
    """Of small sets"""
    repeats: int = 1
    """At each of these above 0"""
    seed: int = 0
    unsafe_code: bool = False
    """Whether programs that the model writes may run"""


@dataclass(frozen=True)
class Run:
    """One pass over a set."""

    temperature: float | None = None
    """None: as the task itself says, as a rule the likeliest token each time"""
    seed: int = 0
    """Of what is drawn"""


@dataclass(frozen=True)
class Summary:
    """A score over several runs of a set."""

    mean: float
    spread: float | None
    """The sample's standard deviation over runs (divisor: runs - 1); None of one run"""
    least: float
    most: float
    runs: int


def runs_of(
    samples: int,
    generates: bool,
    temperatures: Sequence[float] = (),
    repeats: int = 1,
    seed: int = 0,
) -> tuple[Run, ...]:
    """How often, and how, a set of so many samples runs: once as the task says, but a small set
    whose answers are written runs `repeats` times at each temperature, each run with a seed of its
    own, a function of `seed` and the run's number. At temperature 0 every run would be the same, so
    there is one.
    """
    if not generates or samples >= SMALL_SET or not temperatures:
        return (Run(None, seed),)
    wished = [t for t in temperatures for _ in range(repeats if t > 0 else 1)]
    return tuple(Run(t, key64("run", seed, i) % 2**32) for i, t in enumerate(wished))


def summary(scores: Sequence[float]) -> Summary:
    """Of one score or more."""
    mean = math.fsum(scores) / len(scores)
    spread = None
    if len(scores) > 1:
        spread = math.sqrt(math.fsum((x - mean) ** 2 for x in scores) / (len(scores) - 1))
    return Summary(mean, spread, min(scores), max(scores), len(scores))


def count_as_equal(one: float, other: float) -> bool:
    """Whether two scores in points of 100 are equal by the report's rule."""
    return abs(one - other) <= EQUAL_GAP + 1e-9  # 87.1 - 86.8 is a hair more than 0.3 in binary


def benchmark_of(task: str) -> str | None:
    """The report's name of what one of lm-eval's tasks measures; None for one it does not have."""
    fitting = [name for name in _NAMES if re.match(rf"{name}(?![a-z0-9])", task)]
    return _NAMES[max(fitting, key=len)] if fitting else None


def scoring_of(task: str) -> Scoring | None:
    """How the report scores base models on what a task measures; None if it does not have it."""
    benchmark = benchmark_of(task)
    if benchmark is None:
        return None
    return "perplexity" if benchmark in BY_PERPLEXITY else "generation"


def check_runs(temperatures: Sequence[float], repeats: int, chat: bool) -> None:
    """ValueError, in the names of the options, for runs that cannot be."""
    if repeats < 1:
        raise ValueError(f"--repeats is {repeats}; allowed: 1 or more")
    for temperature in temperatures:
        if not 0 <= temperature < 1e38:
            raise ValueError(f"--temperatures has {temperature}; allowed: from 0 to below 1e38")
    known = chosen(temperatures, chat)
    if repeats > 1 and not any(temperature > 0 for temperature in known):
        raise ValueError(
            f"--repeats is {repeats}, and the likeliest tokens are the same each time; allowed: "
            "with --temperatures above 0"
        )


def chosen(temperatures: Sequence[float], chat: bool) -> tuple[float, ...]:
    """Of small sets: as wished, else the protocol's for chat models and none for base models."""
    return tuple(temperatures) or (CHAT_TEMPERATURES if chat else ())
