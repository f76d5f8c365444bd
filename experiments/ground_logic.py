"""Statements of propositional logic over atoms whose values are known, and a prover of them.

    p , ~ q , r |- ( ( p & q ) | r )

Premises say of each atom whether it is true, so exactly one of a statement and its negation has a
proof: bottom-up, a line for each connective that matters. All is written with every bracket, and
with blanks between the signs, so that a tokenizer makes a token of each.
"""

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dsv3_jax.posttrain.formulas import Formula, Statement, joined

ATOMS = ("p", "q", "r")
SIGNS = ("&", "|", "->")


class Claim(NamedTuple):
    """A statement, whether it is true, and the proof of it or of its negation."""

    statement: Statement
    is_true: bool
    proof: str

    @property
    def negation(self) -> Statement:
        """The same premises, and the goal negated."""
        return Statement(self.statement.premises, joined("~", self.statement.goal))

    @property
    def proved(self) -> Statement:
        """The one of both that has a proof."""
        return self.statement if self.is_true else self.negation


def claims(count: int, connectives: Sequence[int], seed: int) -> list[Claim]:
    """So many different ones, of these numbers of connectives, the same every time."""
    draw = random.Random(seed)
    found: dict[Statement, Claim] = {}
    while len(found) < count:
        values = {atom: draw.random() < 0.5 for atom in ATOMS}
        goal = _goal(draw, draw.choice(connectives))
        statement = Statement(tuple(_literal(atom, values) for atom in ATOMS), goal)
        found.setdefault(statement, claim_of(statement))
    return list(found.values())


def text_of(statement: Statement) -> str:
    """As a model is asked."""
    return f"{' , '.join(map(_spaced, statement.premises))} |- {_spaced(statement.goal)}"


def _spaced(formula: Formula) -> str:
    if not formula.parts:
        return formula.sign
    if formula.sign == "~":
        return f"~ {_spaced(*formula.parts)}"
    left, right = map(_spaced, formula.parts)
    return f"( {left} {formula.sign} {right} )"


def _literal(atom: str, values: Mapping[str, bool]) -> Formula:
    return Formula(atom) if values[atom] else joined("~", Formula(atom))


def _goal(draw: random.Random, connectives: int) -> Formula:
    if connectives == 0:
        return Formula(draw.choice(ATOMS))
    left = draw.randrange(connectives)
    parts = [_goal(draw, left), _goal(draw, connectives - 1 - left)]
    return joined(draw.choice(SIGNS), *parts)


def claim_of(statement: Statement) -> Claim:
    """With its proof, or that of its negation."""
    lines, steps = list(statement.premises), []
    place = _prove(statement.goal, lines, steps)
    if not steps:
        steps.append(f"{len(lines) + 1}. {_spaced(lines[place - 1])} by copy {place}")
    return Claim(statement, lines[place - 1] == statement.goal, "\n".join(steps))


def _prove(formula: Formula, lines: list[Formula], steps: list[str]) -> int:
    """The line that says the formula, or its negation if it is false."""
    if not formula.parts:
        known = formula if formula in lines else joined("~", formula)
        return 1 + lines.index(known)
    found = [_prove(part, lines, steps) for part in formula.parts]
    is_true = [lines[place - 1] == part for place, part in zip(found, formula.parts, strict=True)]
    said, rule, cited = _last_step(formula, is_true, found)
    if said in lines:
        return 1 + lines.index(said)
    lines.append(said)
    steps.append(f"{len(lines)}. {_spaced(said)} by {rule} {' '.join(map(str, cited))}")
    return len(lines)


def _last_step(
    formula: Formula, is_true: Sequence[bool], found: Sequence[int]
) -> tuple[Formula, str, Sequence[int]]:
    """What follows of a formula from what is known of its parts, by which rule, from where."""
    denied = joined("~", formula)
    match formula.sign, is_true:
        case "&", (True, True):
            return formula, "and_intro", found
        case "&", (False, _):
            return denied, "not_and_left", found[:1]
        case "&", _:
            return denied, "not_and_right", found[1:]
        case "|", (True, _):
            return formula, "or_left", found[:1]
        case "|", (_, True):
            return formula, "or_right", found[1:]
        case "|", _:
            return denied, "not_or", found
        case "->", (_, True):
            return formula, "imp_true", found[1:]
        case "->", (False, _):
            return formula, "imp_false", found[:1]
    return denied, "not_imp", found
