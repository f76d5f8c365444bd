"""A checker of proofs in propositional logic, step by step: natural deduction as numbered lines.

    3. q by mp 1 2

Premises are lines 1 to n and not written again; a proof goes on behind them. Every line but an
assumption follows, by a rule that it names, from lines before it. `assume` supposes anything;
`imp_intro`, `not_intro` and `cases` let go of what was supposed, and at the end nothing may be
left.

Each line has the assumptions that it rests on. What is kept true from line to line: wherever the
premises and these assumptions are true, so is the line. Formulas stand in the text in full, so a
check takes time and memory in proportion to the text, whatever it says.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dsv3_jax.config.fields import shown
from dsv3_jax.posttrain.formulas import FALSE, Formula, Statement, formula_of, joined, statement_of

MAX_CHARACTERS, MAX_LINES = 20_000, 300
# A rule is a statement of which every instance may be used: each of them is true in all cases.
_TEXTS = {
    "copy": "a |- a",
    "and_intro": "a, b |- a & b",
    "and_left": "a & b |- a",
    "and_right": "a & b |- b",
    "or_left": "a |- a | b",
    "or_right": "b |- a | b",
    "or_not_left": "a | b, ~a |- b",
    "or_not_right": "a | b, ~b |- a",
    "mp": "a -> b, a |- b",
    "mt": "a -> b, ~b |- ~a",
    "imp_true": "b |- a -> b",
    "imp_false": "~a |- a -> b",
    "not_imp": "a, ~b |- ~(a -> b)",
    "not_and_left": "~a |- ~(a & b)",
    "not_and_right": "~b |- ~(a & b)",
    "not_or": "~a, ~b |- ~(a | b)",
    "not_or_left": "~(a | b) |- ~a",
    "not_or_right": "~(a | b) |- ~b",
    "not_not": "a |- ~~a",
    "from_not_not": "~~a |- a",
    "contradiction": "a, ~a |- false",
    "explosion": "false |- a",
    "excluded_middle": "|- a | ~a",
}
RULES = {name: statement_of(text) for name, text in _TEXTS.items()}
_ASSUME = "assume"
_NUMBER = re.compile(r"[1-9][0-9]{0,3}")


class Line(NamedTuple):
    """A formula of a proof."""

    formula: Formula
    rests: int = 0
    """Numbers of assumptions, as bits"""
    is_assumed: bool = False


def checked(statement: Statement, text: str) -> list[Line]:
    """The lines of a proof, premises first. ValueError, one line, which says where and why, for
    what proves nothing or something else.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters; allowed: {MAX_CHARACTERS:,}")
    lines = [Line(premise) for premise in statement.premises]
    written = [line.strip() for line in text.splitlines() if line.strip()]
    if not written or len(written) + len(lines) > MAX_LINES:
        raise ValueError(f"it has {len(written):,} steps; allowed: 1 to {MAX_LINES - len(lines)}")
    for step in written:
        number = len(lines) + 1
        try:
            lines.append(_line(step, number, lines))
        except ValueError as error:
            raise ValueError(f"step {number}: {error}") from None
    last = lines[-1]
    if last.formula != statement.goal:
        raise ValueError(f"it ends with {_short(last.formula)}, not with the goal")
    if last.rests:
        raise ValueError(f"its end rests on the assumption of step {last.rests.bit_length() - 1}")
    return lines


def _line(step: str, number: int, lines: Sequence[Line]) -> Line:
    head, dot, rest = step.partition(".")
    said, by, reason = rest.rpartition(" by ")
    name, *cited = reason.split() or [""]
    if not (dot and by and name and all(map(_NUMBER.fullmatch, cited))):
        raise ValueError(f"{shown(step)} is no step; allowed: NUMBER. FORMULA by RULE NUMBERS")
    if head != str(number):
        raise ValueError(f"its number is {shown(head)}")
    if name not in RULES and name not in _DISCHARGING and name != _ASSUME:
        raise ValueError(f"no rule {shown(name)}")
    formula = formula_of(said.strip())
    found = [_cited(int(other), number, lines) for other in cited]
    if name == _ASSUME:
        _check_count(name, found, 0)
        return Line(formula, 1 << number, True)
    if name in _DISCHARGING:
        count, follows = _DISCHARGING[name]
        _check_count(name, found, count)
        wanted, rests = follows(formula, found, list(map(int, cited)))
    else:
        wanted, rests = _instance(name, formula, found), 0
        for one in found:
            rests |= one.rests
    if formula != wanted:
        raise ValueError(f"{name} gives {_short(wanted)}, not {_short(formula)}")
    return Line(formula, rests)


def _cited(other: int, number: int, lines: Sequence[Line]) -> Line:
    if other >= number:
        raise ValueError(f"it cites {other}, which does not come before it")
    return lines[other - 1]


def _check_count(name: str, found: Sequence[Line], count: int) -> None:
    if len(found) != count:
        raise ValueError(f"{name} cites {count} lines, here {len(found)}")


# --- rules of one step ---------------------------------------------------------------------------


def _instance(name: str, formula: Formula, found: Sequence[Line]) -> Formula:
    """What a rule gives for these lines; where they leave a part open, the formula says it."""
    premises, goal = RULES[name]
    _check_count(name, found, len(premises))
    meant: dict[str, Formula] = {}
    for pattern, line in zip(premises, found, strict=True):
        if not _matches(pattern, line.formula, meant):
            what = _short(line.formula)
            raise ValueError(f"{name} is {RULES[name]}, and {what} does not fit")
    _matches(goal, formula, meant)  # fills what is open
    try:
        return _filled(goal, meant)
    except KeyError:
        raise ValueError(f"{name} is {RULES[name]}, not {_short(formula)}") from None


def _matches(pattern: Formula, formula: Formula, meant: dict[str, Formula]) -> bool:
    """Whether a formula is an instance of a pattern whose letters mean what they meant before."""
    if not pattern.parts and pattern.sign != FALSE:
        return meant.setdefault(pattern.sign, formula) == formula
    if pattern.sign != formula.sign or len(pattern.parts) != len(formula.parts):
        return False
    pairs = zip(pattern.parts, formula.parts, strict=True)
    return all(_matches(part, other, meant) for part, other in pairs)


def _filled(pattern: Formula, meant: dict[str, Formula]) -> Formula:
    if pattern.parts:
        return joined(pattern.sign, *(_filled(part, meant) for part in pattern.parts))
    return pattern if pattern.sign == FALSE else meant[pattern.sign]


# --- rules that let go of an assumption ----------------------------------------------------------


def _imp_intro(_: Formula, found: Sequence[Line], numbers: Sequence[int]) -> tuple[Formula, int]:
    supposed, then = found
    return joined("->", supposed.formula, then.formula), _without(supposed, then, numbers[0])


def _not_intro(_: Formula, found: Sequence[Line], numbers: Sequence[int]) -> tuple[Formula, int]:
    supposed, then = found
    if then.formula != Formula(FALSE):
        raise ValueError(f"not_intro wants false in its second line, not {_short(then.formula)}")
    return joined("~", supposed.formula), _without(supposed, then, numbers[0])


def _cases(formula: Formula, found: Sequence[Line], numbers: Sequence[int]) -> tuple[Formula, int]:
    """Lines: a | b, the assumption a, what follows, the assumption b, what follows."""
    either, one, then, other, too = found
    if either.formula != joined("|", one.formula, other.formula):
        wanted = _short(joined("|", one.formula, other.formula))
        raise ValueError(f"cases wants {wanted} in its first line, not {_short(either.formula)}")
    if then.formula != too.formula:
        raise ValueError(f"cases ends in {_short(then.formula)} and {_short(too.formula)}")
    rests = _without(one, then, numbers[1]) | _without(other, too, numbers[3])
    return then.formula, either.rests | rests


def _without(supposed: Line, then: Line, number: int) -> int:
    if not supposed.is_assumed:
        raise ValueError(f"step {number} is no assumption")
    return then.rests & ~(1 << number)


_Follows = Callable[[Formula, Sequence[Line], Sequence[int]], tuple[Formula, int]]
_DISCHARGING: dict[str, tuple[int, _Follows]] = {
    "imp_intro": (2, _imp_intro),
    "not_intro": (2, _not_intro),
    "cases": (5, _cases),
}
NAMES = (*RULES, _ASSUME, *_DISCHARGING)


def _short(formula: Formula) -> str:
    text = str(formula)
    return text if len(text) <= 60 else f"{text[:57]}..."
