"""What is true by truth tables, and random formulas and proofs to hold against it."""

import itertools
import random

from dsv3_jax.posttrain.formulas import FALSE, Formula, Statement, joined
from dsv3_jax.posttrain.natural_deduction import RULES

ATOMS = ("p", "q", "r")


def atoms_of(formula: Formula) -> set[str]:
    if formula.parts:
        return set().union(*map(atoms_of, formula.parts))
    return {formula.sign} - {FALSE}


def holds(statement: Statement) -> bool:
    """In every case in which the premises are true, so is the goal."""
    formulas = (*statement.premises, statement.goal)
    names = sorted(set().union(*map(atoms_of, formulas)))
    for values in itertools.product((False, True), repeat=len(names)):
        case = dict(zip(names, values, strict=True))
        if all(one.value(case) for one in statement.premises) and not statement.goal.value(case):
            return False
    return True


def random_formula(draw: random.Random, depth: int) -> Formula:
    if depth == 0 or draw.random() < 0.2:
        return Formula(draw.choice((*ATOMS, *ATOMS, FALSE)))
    sign = draw.choice(("~", "&", "|", "->"))
    return joined(sign, *(random_formula(draw, depth - 1) for _ in range(1 + (sign != "~"))))


def random_proof(draw: random.Random) -> tuple[Statement, str]:
    """Steps of rules applied to whatever lines there are; many a one does not follow, and the goal
    is whatever came last.
    """
    premises = tuple(random_formula(draw, 2) for _ in range(draw.randrange(4)))
    lines, steps = list(premises), []
    for _ in range(draw.randint(1, 6)):
        formula, reason = _step(draw, lines)
        lines.append(formula)
        steps.append(f"{len(lines)}. {formula} by {reason}")
    return Statement(premises, lines[-1]), "\n".join(steps)


def _step(draw: random.Random, lines: list[Formula]) -> tuple[Formula, str]:
    kind = draw.random()
    if not lines or kind < 0.3:
        return random_formula(draw, 1), "assume"
    places = range(1, len(lines) + 1)
    if kind < 0.45:
        one, two = draw.choice(places), draw.choice(places)
        return joined("->", lines[one - 1], lines[two - 1]), f"imp_intro {one} {two}"
    if kind < 0.6:
        one, two = draw.choice(places), draw.choice(places)
        return joined("~", lines[one - 1]), f"not_intro {one} {two}"
    if kind < 0.65:
        cited = [draw.choice(places) for _ in range(5)]
        return lines[cited[2] - 1], f"cases {' '.join(map(str, cited))}"
    return _instance(draw, lines)


def _instance(draw: random.Random, lines: list[Formula]) -> tuple[Formula, str]:
    """Of a rule whose premises some lines fit; now and then it says something else."""
    while True:
        name, rule = draw.choice(list(RULES.items()))
        cited = draw.choices(range(len(lines)), k=len(rule.premises))
        meant: dict[str, Formula] = {}
        chosen = [lines[place] for place in cited]
        if all(fits(p, f, meant) for p, f in zip(rule.premises, chosen, strict=True)):
            for letter in atoms_of(rule.goal) - meant.keys():
                meant[letter] = random_formula(draw, 1)
            said = put_in(rule.goal, meant) if draw.random() < 0.9 else random_formula(draw, 1)
            return said, " ".join([name, *(str(place + 1) for place in cited)])


def fits(pattern: Formula, formula: Formula, meant: dict[str, Formula]) -> bool:
    if not pattern.parts and pattern.sign != FALSE:
        return meant.setdefault(pattern.sign, formula) == formula
    alike = (pattern.sign, len(pattern.parts)) == (formula.sign, len(formula.parts))
    pairs = zip(pattern.parts, formula.parts, strict=False)
    return alike and all(fits(part, other, meant) for part, other in pairs)


def put_in(pattern: Formula, meant: dict[str, Formula]) -> Formula:
    if pattern.parts:
        return joined(pattern.sign, *(put_in(part, meant) for part in pattern.parts))
    return meant.get(pattern.sign, pattern)
