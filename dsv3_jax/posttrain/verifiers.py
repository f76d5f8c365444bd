"""Judges of answers, by name: the rules of rejection sampling (report 5.1, 5.2.1).

An answer is kept if all verifiers of its kind accept it. A verifier that raises has rejected it,
and says why. Nothing here runs what a model has written.
"""

import importlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any, Literal

from dsv3_jax.config.fields import shown
from dsv3_jax.posttrain.completions import Completion
from dsv3_jax.posttrain.duplicates import normalised
from dsv3_jax.posttrain.formulas import statement_of
from dsv3_jax.posttrain.natural_deduction import checked
from dsv3_jax.posttrain.problems import Messages, Problem
from dsv3_jax.posttrain.templates import TEMPLATES

By = Literal["rule", "model", "human"]
_RANKS = ("rule", "model", "human")
_NAMES = (
    "exact, boxed, proof, regex, regex:PATTERN, json, json:KEY,KEY, words:LEAST-MOST, "
    "python:module:function"
)


@dataclass(frozen=True)
class Answer:
    """What a verifier sees."""

    text: str
    """Without its reasoning"""
    reasoning: str | None
    reference: str | None
    prompt: str
    messages: Messages
    kind: str
    id: str


@dataclass(frozen=True)
class Verdict:
    """What it says."""

    accepted: bool
    note: str = ""
    by: By = "rule"


@dataclass(frozen=True)
class Verifier:
    """A judge."""

    name: str
    """As the option has it"""
    judge: Callable[[Answer], Any]
    """Returns a Verdict, a bool, a pair of bool and note, or a mapping of a Verdict's fields"""
    needs_reference: bool = False
    kind: str | None = None
    """The one it judges; None: all"""
    check_reference: Callable[[str], Any] = str
    """ValueError, one line, for a reference that nothing can be compared with"""


def verifiers(specs: Sequence[str]) -> list[Verifier]:
    """Of `--verifier` options: each a name, or `KIND=` and a name. ValueError, one line, for an
    unknown one, a pattern that is none, and a function that cannot be imported.
    """
    return [_verifier(spec) for spec in specs]


def _verifier(spec: str) -> Verifier:
    kind, separator, name = spec.partition("=")
    if not separator or kind not in TEMPLATES:
        kind, name = None, spec
    what, _, argument = name.partition(":")
    make = _MAKERS.get(what)
    if make is None or (argument and what in _WITH_REFERENCE):
        raise ValueError(f"--verifier is {shown(spec)}; allowed: {_NAMES}, behind KIND= if wished")
    try:
        judge = make(argument)
    except ValueError as error:
        raise ValueError(f"--verifier {shown(spec)}: {error}") from None
    needs = name in (*_WITH_REFERENCE, "regex")
    return Verifier(spec, judge, needs, kind, _READERS.get(name, str))


def judged(
    problem: Problem, completion: Completion, judges: Sequence[Verifier]
) -> tuple[Verdict | None, str | None]:
    """The verdict of all, and who decided: the first that rejects, or all of them. None without a
    verifier for this kind. An answer that is cut or empty is rejected before any is asked.
    """
    if completion.cut:
        return Verdict(False, "its length ended it"), "cut at its length"
    if not completion.text.strip():
        return Verdict(False, "it is empty"), "empty"
    answer = Answer(
        completion.text,
        completion.reasoning,
        problem.reference,
        problem.prompt,
        problem.messages,
        problem.kind,
        problem.id,
    )
    said: dict[str, Verdict] = {}
    for verifier in judges:
        if verifier.kind in (None, problem.kind):
            said[verifier.name] = verdict = _verdict(verifier, answer)
            if not verdict.accepted:
                return verdict, verifier.name
    if not said:
        return None, None
    notes = "; ".join(filter(None, (verdict.note for verdict in said.values())))
    by = max((verdict.by for verdict in said.values()), key=_RANKS.index)
    return Verdict(True, notes, by), ", ".join(said)


def _verdict(verifier: Verifier, answer: Answer) -> Verdict:
    try:
        verdict = as_verdict(verifier.judge(answer))
    except (Exception, SystemExit) as error:  # the user's function may raise anything
        said = " ".join(str(error).split())
        verdict = Verdict(False, f"{type(error).__name__}: {said}"[:300])
    # Of halves of surrogate pairs, which no file of ours can hold, question marks.
    return replace(verdict, note=verdict.note.encode("utf-8", "replace").decode())


def as_verdict(said: Any) -> Verdict:
    """Of what a judge returned. TypeError, one line, for anything else."""
    match said:
        case Verdict():
            return said
        case bool():
            return Verdict(said)
        case (bool() as accepted, str() as note):
            return Verdict(accepted, note)
        case Mapping():
            verdict = Verdict(**said)
            by_whom = verdict.by in _RANKS
            if type(verdict.accepted) is bool and isinstance(verdict.note, str) and by_whom:
                return verdict
    raise TypeError(
        f"the verifier returned {shown(said)}; allowed: a bool, a pair of bool and note, or a "
        "mapping of accepted, note and by (rule, model, human)"
    )


# --- the verifiers -------------------------------------------------------------------------------


def _exact(_: str) -> Callable[[Answer], Verdict]:
    def judge(answer: Answer) -> Verdict:
        same = normalised(answer.text) == normalised(answer.reference)
        return Verdict(same, "" if same else "it differs from the reference")

    return judge


def _boxed(_: str) -> Callable[[Answer], Verdict]:
    def judge(answer: Answer) -> Verdict:
        found, wanted = boxed(answer.text), boxed(answer.reference)
        if found is None:
            return Verdict(False, "no \\boxed{}")
        same = same_value(found, answer.reference if wanted is None else wanted)
        return Verdict(same, found if same else f"{found} differs from the reference")

    return judge


def _proof(_: str) -> Callable[[Answer], Verdict]:
    def judge(answer: Answer) -> Verdict:
        statement = statement_of(answer.reference)
        try:
            lines = checked(statement, answer.text)
        except ValueError as error:
            return Verdict(False, str(error))
        return Verdict(True, f"{len(lines) - len(statement.premises)} steps")

    return judge


def _pattern(source: str) -> re.Pattern:
    try:
        return re.compile(source, re.DOTALL)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"no regular expression: {error}") from None


def _regex(source: str) -> Callable[[Answer], Verdict]:
    fixed = _pattern(source)

    def judge(answer: Answer) -> Verdict:
        found = (fixed if source else _pattern(answer.reference)).search(answer.text)
        return Verdict(found is not None, "" if found else "the pattern is nowhere in it")

    return judge


def _json(keys: str) -> Callable[[Answer], Verdict]:
    needed = [key.strip() for key in keys.split(",") if key.strip()]

    def judge(answer: Answer) -> Verdict:
        fenced = re.fullmatch(r"```(?:json)?[^\S\n]*\n(.*)```", answer.text.strip(), re.DOTALL)
        found = json.loads(fenced[1] if fenced else answer.text)
        if not needed:
            return Verdict(True)
        missing = [key for key in needed if not isinstance(found, dict) or key not in found]
        return Verdict(not missing, f"lacks {', '.join(missing)}" if missing else "")

    return judge


def _words(span: str) -> Callable[[Answer], Verdict]:
    found = re.fullmatch(r"(\d{1,9})-(\d{1,9})", span)
    if found is None or int(found[1]) > int(found[2]):
        raise ValueError("allowed: words:LEAST-MOST, as in words:1-200")
    least, most = int(found[1]), int(found[2])

    def judge(answer: Answer) -> Verdict:
        count = len(answer.text.split())
        return Verdict(least <= count <= most, f"{count} words")

    return judge


def plug_in(path: str) -> Callable[[Any], Any]:
    """The function of `module:function`. ValueError, one line, if it cannot be imported."""
    module, separator, name = path.partition(":")
    if not (module and separator and name):
        raise ValueError("allowed: python:module:function")
    if "" not in sys.path:  # as `python -m` has it: modules beside where the user stands
        sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # user code may raise anything
        said = " ".join(str(error).split())
        raise ValueError(f"{type(error).__name__}: {said}") from None
    if not callable(function):
        raise ValueError(f"{name} is {shown(function)}; allowed: a function of one answer")
    return partial(function)


_WITH_REFERENCE = ("exact", "boxed", "proof")
_READERS: dict[str, Callable[[str], Any]] = {"proof": statement_of, "regex": _pattern}
_MAKERS: dict[str, Callable[[str], Callable[[Answer], Any]]] = {
    "exact": _exact,
    "boxed": _boxed,
    "proof": _proof,
    "regex": _regex,
    "json": _json,
    "words": _words,
    "python": plug_in,
}


# --- boxed answers -------------------------------------------------------------------------------


def boxed(text: str) -> str | None:
    """What stands in the last \\boxed{} whose braces close; None if there is none."""
    open_braces: list[tuple[int, bool]] = []
    last = -1, None
    for found in re.finditer(r"(\\boxed\s*)?\{|\\.|\}", text, re.DOTALL):
        if found[0].endswith("{") and not found[0].startswith("\\{"):
            open_braces.append((found.end(), found[1] is not None))
        elif found[0] == "}" and open_braces:
            start, is_box = open_braces.pop()
            if is_box and start > last[0]:
                last = start, text[start : found.start()].strip()
    return last[1]


def same_value(one: str, other: str) -> bool:
    """Whether two answers are the same text but for LaTeX's spacing, or the same number."""
    texts, twins = _texts(one), _texts(other)
    if not texts.isdisjoint(twins):
        return True
    value = _number(_joined(one))
    return value is not None and value == _number(_joined(other))


_GROUP = re.compile(r"(?<=\d)(?:(?:,|\{,\})(?:\\!)?|\\[,:;!])(?=\d{3}(?!\d))")
_SPACING = r"(?:\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[,;:! ]|[\s$~])+"
# A blank between two numbers tells them apart.
_BLANK = re.compile(rf"(?:(?<=\d)|(?<=\d\.)){_SPACING}(?=\.?\d)")
_NUMBER = re.compile(r"([+-]?)(?:(\d{1,100}) )?(\d{1,100})?(?:\.(\d{0,100}))?(?:/(\d{1,100}))?")


def _texts(text: str) -> set[str]:
    """Both readings of 3,100: two numbers, or one."""
    return {_plain(text), _joined(text)}


def _joined(text: str) -> str:
    """Without what sets off thousands: 1,234 and 1{,}234 and 1\\,234, but no mere blank."""
    return _plain(_GROUP.sub("", text))


def _plain(text: str) -> str:
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\frac\s*(\d)", r"\\frac{\1}", text)  # TeX takes one digit without braces
    text = re.sub(r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}", text)
    parts = _BLANK.split(text)
    return " ".join(re.sub(_SPACING, "", part) for part in parts).removesuffix(".")


def _number(text: str) -> Fraction | None:
    """Of 12, -0.5, 1/2 and \\frac{1}{2}, of 1 1/2 and 1\\frac{1}{2}, also in per cent; None for
    anything else.
    """
    percent = text.endswith("%")
    text = text.removesuffix("%").removesuffix("\\")
    text = re.sub(r"(?<=\d)(?=\\frac)", " ", text)  # a mixed number, not one digit more
    text = re.sub(r"\\frac\{([^{}]+)\}\{([^{}]+)\}", r"\1/\2", text)
    found = _NUMBER.fullmatch(text)
    if found is None or not (found[3] or found[4]):
        return None
    sign, before, whole, decimals, below = found.groups()
    if below is not None and (decimals is not None or not int(below)):
        return None
    if before is not None and (below is None or whole is None):
        return None
    value = int(before or 0) + Fraction(f"{whole or 0}.{decimals or 0}") / int(below or 1)
    return (-value if sign == "-" else value) / (100 if percent else 1)
