"""Pass rates: by counting all choices of attempts, and of statements with their negations."""

import itertools
from statistics import mean

import pytest

from dsv3_jax.posttrain.iteration_statistics import (
    budgets,
    is_accepted,
    pass_at,
    pass_rates,
    settled,
    sides_of,
    twin_of,
)
from tests.posttrain.scripted_models import problem

KIND = "reasoning_original"


def test_pass_at_k_is_the_mean_over_all_choices_of_k_attempts():
    for attempts in range(1, 7):
        for accepted in range(attempts + 1):
            found = [True] * accepted + [False] * (attempts - accepted)
            for k in range(1, attempts + 1):
                chosen = [any(some) for some in itertools.combinations(found, k)]
                assert pass_at(k, attempts, accepted) == pytest.approx(mean(chosen))


def test_budgets_double_and_end_with_all():
    assert [budgets(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def entry(id_: str, verdict: str | None) -> dict:
    said = {"failed": "x"} if verdict is None else {"verification": {"verdict": verdict}}
    return {"id": id_, "kind": KIND, **said}


def test_only_what_a_verifier_let_pass_is_accepted():
    assert [is_accepted(entry("a", v)) for v in ("accepted", "rejected", None)] == [
        True,
        False,
        False,
    ]
    assert not is_accepted({"verification": {"verdict": None}})


def test_a_statement_and_its_negation_are_settled_by_either():
    problems = [problem(id=name) for name in ("not a", "a", "b", "not c")]
    statements = sides_of(problems)

    def key(name: str) -> tuple[str, str]:
        return name, KIND

    assert statements == {
        key("a"): [key("a"), key("not a")],
        key("b"): [key("b")],
        key("not c"): [key("not c")],  # nobody claims c
    }
    known = {one.key for one in problems}
    assert [twin_of(key(i), known) for i in ("a", "not a", "b", "not c")] == [
        key("not a"),
        key("a"),
        None,
        None,
    ]
    entries = [entry("a", "rejected"), entry("a", None)]
    entries += [entry("not a", v) for v in ("accepted", "rejected")]
    entries += [entry("b", v) for v in ("accepted", "accepted")]
    found = pass_rates(statements, entries, 2)
    assert found["statements"] == 2
    assert (found["attempts"], found["accepted"], found["share"]) == (6, 3, 0.5)
    assert found["pass"] == {"1": 0.75, "2": 1.0}
    assert settled(statements, {key("not a"), key("b")}) == {
        "proved": 1,
        "refuted": 1,
        "both": 0,
        "cumulative": pytest.approx(2 / 3),
    }
    assert settled(statements, {key("not a"), key("a")})["both"] == 1


def test_rates_of_nothing_are_zero():
    found = pass_rates(sides_of([problem()]), [], 3)
    assert (found["statements"], found["share"]) == (0, 0.0)
    assert set(found["pass"].values()) == {0.0}
