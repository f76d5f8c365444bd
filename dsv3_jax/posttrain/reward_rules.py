"""Rewards by rule: verifiers as 1 and 0, terms of style and length, functions of the user's own.

The report checks mathematics by its boxed answer and says that style and length are controlled, but
gives no term for either; those of style and length here are ours. Every rule is a function of one
attempt, and runs in a process of its own (`reward_workers`), where it may raise or hang.
"""

import re
from collections.abc import Callable
from typing import Any

from dsv3_jax.posttrain.attempts import Attempt
from dsv3_jax.posttrain.duplicates import words
from dsv3_jax.posttrain.formats import FORMATS
from dsv3_jax.posttrain.verifiers import Answer, Verifier, as_verdict, plug_in, verifiers

Rule = Callable[[Attempt], Any]
RULES = (
    "boxed, exact, proof, regex, regex:PATTERN, json, json:KEY,KEY, words:LEAST-MOST, format:NAME, "
    "length:FREE-MOST, python:module:function"
)
FORMAT_NAMES = {name.replace(" ", "-").lower(): name for name in FORMATS}
"""format:boxed-answer and so on"""


def rule(name: str, allowed: str = RULES) -> Rule:
    """By its name. ValueError, one line, for an unknown one, which tells what is `allowed`, and for
    a function that cannot be imported.
    """
    what, _, argument = name.partition(":")
    if what == "python":
        return plug_in(argument)
    if what == "format":
        return _format(argument)
    if what == "length":
        return _length(argument)
    if name in ("boxed", "exact", "proof") or what in ("regex", "json", "words"):
        try:
            return _verified(*verifiers([name]))
        except ValueError as error:
            raise ValueError(str(error).partition(": ")[2]) from None
    raise ValueError(f"unknown; allowed: {allowed}")


def _verified(verifier: Verifier) -> Rule:
    def rate(attempt: Attempt) -> tuple[float, str]:
        if attempt.cut:
            return 0.0, "its length ended it"
        if not attempt.text.strip():
            return 0.0, "it is empty"
        if verifier.needs_reference and attempt.reference is None:
            raise ValueError("the prompt has no reference")
        answer = Answer(
            attempt.text,
            attempt.reasoning,
            attempt.reference,
            attempt.prompt,
            [{"role": "user", "content": attempt.prompt}],
            attempt.kind,
            attempt.id,
        )
        verdict = as_verdict(verifier.judge(answer))
        return float(verdict.accepted), verdict.note

    return rate


def _format(name: str) -> Rule:
    if name not in FORMAT_NAMES:
        raise ValueError(f"allowed: format:NAME, of {', '.join(FORMAT_NAMES)}")
    has = FORMATS[FORMAT_NAMES[name]]

    def rate(attempt: Attempt) -> tuple[float, str]:
        found = has(attempt.whole)
        return float(found), "" if found else f"no {FORMAT_NAMES[name]}"

    return rate


def _length(span: str) -> Rule:
    """1 up to FREE tokens (words, where nobody counted), 0 from MOST on, a line between."""
    found = re.fullmatch(r"(\d{1,9})-(\d{1,9})", span)
    if found is None or int(found[1]) >= int(found[2]):
        raise ValueError("allowed: length:FREE-MOST, as in length:512-1024")
    free, most = int(found[1]), int(found[2])

    def rate(attempt: Attempt) -> tuple[float, str]:
        size, unit = attempt.tokens, "tokens"
        if size is None:
            size, unit = len(words(f"{attempt.text} {attempt.reasoning or ''}")), "words"
        return min(max((most - size) / (most - free), 0.0), 1.0), f"{size} {unit}"

    return rate
