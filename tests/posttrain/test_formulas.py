"""Formulas: text and back, values, and text that is none."""

import itertools
import random
import re

import pytest

from dsv3_jax.posttrain.formulas import Formula, formula_of, statement_of
from tests.posttrain.logic import ATOMS, random_formula

P, Q, R = (Formula(name) for name in ATOMS)


def test_text_is_read_back_as_the_same_formula():
    draw = random.Random(0)
    for _ in range(2000):
        formula = random_formula(draw, draw.randrange(6))
        assert formula_of(str(formula)) == formula
        spaced = str(formula).replace("(", " ( ").replace("~", " ~ ")
        assert formula_of(spaced) == formula


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("p & q | r", "(p & q) | r"),
        ("p | q & r", "p | (q & r)"),
        ("p -> q -> r", "p -> (q -> r)"),
        ("p & q & r", "(p & q) & r"),
        ("~p & q", "(~p) & q"),
        ("~~p -> q | r", "(~(~p)) -> (q | r)"),
    ],
)
def test_signs_bind_as_told(short: str, full: str):
    assert formula_of(short) == formula_of(full)
    assert str(formula_of(full)) == short


@pytest.mark.parametrize(
    ("text", "python"),
    [
        ("p & q -> r", "not (p and q) or r"),
        ("~(p | q) & true_", "not (p or q) and r"),
        ("p -> q -> r", "not p or (not q or r)"),
        ("(p -> q) -> r", "not (not p or q) or r"),
        ("p -> false", "not p"),
    ],
)
def test_values_are_those_of_python(text: str, python: str):
    formula = formula_of(text.replace("true_", "r"))
    for values in itertools.product((False, True), repeat=3):
        case = dict(zip(ATOMS, values, strict=True))
        assert formula.value(case) == bool(eval(python, dict(case)))


def test_statements_have_premises_or_none():
    for text in ("p, ~q |- p | q", "|- p | ~p"):
        assert str(statement_of(text)) == text
    assert statement_of("p -> p") == statement_of("|- p -> p")
    assert len(statement_of("p, q & r |- p").premises) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'' is no formula: its end where a formula should begin"),
        ("p &", "its end where"),
        ("p q", "'q' where it could end"),
        ("p ~q", "'~' where it could end"),
        ("(p", "a bracket that does not close"),
        ("p)", "')' where it could end"),
        ("P & q", "'P' in it"),
        ("p ∧ q", "'∧' in it"),
        ("p | - q", "'-' in it"),
        ("~" * 51 + "p", "deeper than 50"),
        ("(" * 500 + "p" + ")" * 499, "deeper than 50"),
        ("p" + "&p" * 51, "deeper than 50"),
        ("p" + "->p" * 51, "deeper than 50"),
        ("p" * 1001, "1,001 characters; allowed: 1,000"),
        ("\ud800", "in it"),
    ],
)
def test_what_is_no_formula_is_refused_in_a_line(text: str, said: str):
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        formula_of(text)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("text", ["p,, q |- p", "p |-", "p |- q |- r", "p,"])
def test_what_is_no_statement_is_refused(text: str):
    with pytest.raises(ValueError, match="no formula"):
        statement_of(text)
