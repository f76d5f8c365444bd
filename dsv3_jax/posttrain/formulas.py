"""Formulas of propositional logic as text: `p & ~q -> r | false`, and statements `p, ~q |- p | r`.

`~` binds closest, then `&`, `|`, and `->`, which leans to the right where the others lean to the
left. Whatever a model has written can be read, or refused in a line: length and depth are bounded.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from dsv3_jax.config.fields import shown

MAX_CHARACTERS, MAX_DEPTH = 1000, 50
FALSE = "false"
_BINDS = {"->": 1, "|": 2, "&": 3, "~": 4}
_LOOSEST = 1
_TOKEN = re.compile(r"\s*(->|[~&|()]|[a-z][a-z0-9_]*)")


class Formula(NamedTuple):
    """A tree; equal ones are the same formula."""

    sign: str
    """&, |, ->, ~, false or the name of an atom"""
    parts: tuple["Formula", ...] = ()
    depth: int = 0

    def __str__(self) -> str:
        """With no more brackets than it needs; `formula_of` is the way back."""
        return _text(self, _LOOSEST)

    def value(self, atoms: Mapping[str, bool]) -> bool:
        """Whether it is true where its atoms are so."""
        match self.sign, self.parts:
            case "~", (one,):
                return not one.value(atoms)
            case "&", (one, two):
                return one.value(atoms) and two.value(atoms)
            case "|", (one, two):
                return one.value(atoms) or two.value(atoms)
            case "->", (one, two):
                return not one.value(atoms) or two.value(atoms)
        return self.sign != FALSE and atoms[self.sign]


class Statement(NamedTuple):
    """A goal that is claimed to follow from premises."""

    premises: tuple[Formula, ...]
    goal: Formula

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.premises))} |- {self.goal}".lstrip()


def joined(sign: str, *parts: Formula) -> Formula:
    """A formula of formulas. ValueError beyond MAX_DEPTH."""
    depth = 1 + max(part.depth for part in parts)
    if depth > MAX_DEPTH:
        raise ValueError(f"a formula is deeper than {MAX_DEPTH}")
    return Formula(sign, parts, depth)


def formula_of(text: str) -> Formula:
    """ValueError, one line, for what is none, and beyond the bounds."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"a formula has {len(text):,} characters; allowed: {MAX_CHARACTERS:,}")
    return _Reader(text).whole()


def statement_of(text: str) -> Statement:
    """Of `premise, premise |- goal`, or of a goal alone. ValueError, one line, for another text."""
    before, separator, after = text.partition("|-")
    if not separator:
        before, after = "", text
    premises = before.split(",") if before.strip() else []
    return Statement(tuple(map(formula_of, premises)), formula_of(after))


class _Reader:
    def __init__(self, text: str) -> None:
        self._text, self._left = text, []
        place = 0
        while text[place:].strip():
            found = _TOKEN.match(text, place)
            if found is None:
                raise ValueError(f"{shown(text)} is no formula: {text[place:].lstrip()[0]!r} in it")
            self._left.append(found[1])
            place = found.end()
        self._left.reverse()  # the next one is the last

    def whole(self) -> Formula:
        formula = self._operation(_LOOSEST, 0)
        if self._left:
            raise self._fault(f"{self._left[-1]!r} where it could end")
        return formula

    def _operation(self, binding: int, level: int) -> Formula:
        """Of signs that bind at least as closely as `binding`."""
        formula = self._single(level)
        while self._left and _BINDS.get(self._left[-1], 0) >= binding and self._left[-1] != "~":
            sign = self._left.pop()
            inner = _BINDS[sign] + (sign != "->")
            formula = joined(sign, formula, self._operation(inner, level + 1))
        return formula

    def _single(self, level: int) -> Formula:
        if level > MAX_DEPTH:
            raise ValueError(f"a formula is deeper than {MAX_DEPTH}")
        token = self._left.pop() if self._left else "its end"
        if token == "~":
            return joined("~", self._single(level + 1))
        if token == "(":
            formula = self._operation(_LOOSEST, level + 1)
            if not self._left or self._left.pop() != ")":
                raise self._fault("a bracket that does not close")
            return formula
        if not token[0].isalpha() or token == "its end":
            raise self._fault(f"{token} where a formula should begin")
        return Formula(token)

    def _fault(self, what: str) -> ValueError:
        return ValueError(f"{shown(self._text)} is no formula: {what}")


def _text(formula: Formula, binding: int) -> str:
    sign, parts = formula.sign, formula.parts
    if not parts:
        return sign
    if sign == "~":
        return f"~{_text(parts[0], _BINDS[sign])}"
    own = _BINDS[sign]
    left, right = (own + 1, own) if sign == "->" else (own, own + 1)
    text = f"{_text(parts[0], left)} {sign} {_text(parts[1], right)}"
    return f"({text})" if own < binding else text
