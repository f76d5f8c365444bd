"""Rewards: what each says, sums, failures that do not stop the work, statistics."""

import math
import re
import sys
from collections.abc import Iterator

import pytest

from dsv3_jax.posttrain.attempts import Attempt, Rated
from dsv3_jax.posttrain.reward_rules import FORMAT_NAMES, rule
from dsv3_jax.posttrain.reward_statistics import reward_statistics, style, style_table
from dsv3_jax.posttrain.reward_workers import Workers
from dsv3_jax.posttrain.rewards import Means, Reward, Rewards, Total, rewards


def attempt(text: str = "so \\boxed{4}", **changes) -> Attempt:
    return Attempt(**{"prompt": "2 + 2?", "text": text, "reference": "4"} | changes)


# --- rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "one", "value"),
    [
        ("boxed", attempt(), 1.0),
        ("boxed", attempt("\\boxed{5}"), 0.0),
        ("boxed", attempt(cut=True), 0.0),
        ("boxed", attempt(" \n"), 0.0),
        ("exact", attempt(" 4 "), 1.0),
        ("regex:^so", attempt(), 1.0),
        ("json:a", attempt('{"a": 1}'), 1.0),
        ("words:1-2", attempt("a b c"), 0.0),
        ("format:boxed-answer", attempt(), 1.0),
        ("format:reasoning", attempt(), 0.0),
        ("format:reasoning", attempt(reasoning="hm"), 1.0),
        ("format:code-block", attempt("```\n1\n```"), 1.0),
        ("length:10-20", attempt(tokens=10), 1.0),
        ("length:10-20", attempt(tokens=15), 0.5),
        ("length:10-20", attempt(tokens=21), 0.0),
        ("length:1-3", attempt("one two"), 0.5),
        ("length:1-4", attempt("one", reasoning="more"), 2 / 3),
    ],
)
def test_what_rules_are_worth(name: str, one: Attempt, value: float):
    rated = Rated.of(rule(name)(one))
    assert (rated.value, rated.failed) == (pytest.approx(value), False)


def test_formats_are_those_of_the_statistics():
    assert set(FORMAT_NAMES) == {
        "boxed-answer",
        "reasoning",
        "code-block",
        "list",
        "heading",
        "several-paragraphs",
        "json",
    }


@pytest.mark.parametrize(
    ("said", "rated"),
    [
        (1, Rated(1.0)),
        (True, Rated(1.0)),
        ((0.5, "half\nway"), Rated(0.5, "half way")),
        (Rated(2.0, "x"), Rated(2.0, "x")),
        (Rated(0.0, "x", failed=True), Rated(0.0, "x", True)),
    ],
)
def test_what_a_reward_may_return(said, rated: Rated):
    assert Rated.of(said) == rated


@pytest.mark.parametrize(
    "said",
    [math.nan, math.inf, None, "1", (math.nan, "x"), Rated(math.nan), 10**400, 1.1e30, [1, 2]],
)
def test_what_is_no_number_is_a_failure(said):
    rated = Rated.of(said)
    assert (rated.failed, rated.value) == (True, 0.0)
    assert "allowed: a finite number" in rated.reason


# --- sums ----------------------------------------------------------------------------------------


def test_values_are_weighted_and_summed_and_failures_have_the_value_chosen_for_them():
    def some_fail(attempts):
        return [1.0 if one.text else math.nan for one in attempts]

    def raises(attempts):
        raise LookupError("not\nthere")

    terms = [
        Reward("half", lambda attempts: [(0.5, "why")] * len(attempts), 2.0),
        Reward("some", some_fail, 0.25),
        Reward("raises", raises, 10.0),
        Reward("short", lambda attempts: [1.0], 1.0),
    ]
    both = [attempt("a"), attempt("")]
    first, second = Rewards(terms, failed=-1.0).rate(both)
    assert first.value == 1.0 + 0.25 - 10.0 - 1.0
    assert second.value == 1.0 - 0.25 - 10.0 - 1.0
    assert first.parts["half"] == Rated(0.5, "why")
    assert first.parts["some"] == Rated(1.0)
    assert first.parts["raises"] == Rated(-1.0, "LookupError: not there", True)
    assert first.parts["short"] == Rated(-1.0, "ValueError: 1 values for 2 attempts", True)
    assert second.parts["some"].failed
    assert Rewards(terms).rate(both)[0].value == 1.25
    assert Rewards(terms).rate([]) == []


def test_the_largest_values_and_weights_have_sums_and_statistics():
    terms = [Reward(str(n), lambda attempts: [1e30] * len(attempts), 1e30) for n in range(3)]
    totals = Rewards(terms).rate([attempt()])
    assert math.isfinite(totals[0].value ** 2)


def test_names_carry_weights():
    with rewards(["boxed", "length:1-2*0.5", "regex:a*b*-2"], Means(), -0.5) as made:
        assert [(one.name, one.weight) for one in made.terms] == [
            ("boxed", 1.0),
            ("length:1-2", 0.5),
            ("regex:a*b", -2.0),
        ]
        assert made.failed == -0.5


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "--reward is missing; allowed: one or more of boxed, "),
        (["boxes"], "--reward 'boxes': unknown; allowed: boxed, .*, tests, .*judge:score"),
        (["boxed:x"], "--reward 'boxed:x': unknown; allowed: boxed, "),
        (["writing=boxed"], "--reward 'writing=boxed': unknown; allowed: boxed, "),
        (["boxed*x"], r"--reward is 'boxed\*x'; allowed: NAME or NAME\*WEIGHT"),
        (["boxed*1e999"], "the weight a number"),
        (["boxed*-1.1e30"], r"the weight a number of at most 1e\+30 in size$"),
        (["*2"], "allowed: NAME"),
        (["boxed", "boxed*2"], "--reward 'boxed' stands there twice"),
        (["regex:("], r"--reward 'regex:\(': no regular expression"),
        (["words:3"], "allowed: words:LEAST-MOST"),
        (["format:x"], "allowed: format:NAME, of boxed-answer, "),
        (["length:5-5"], "allowed: length:FREE-MOST"),
        (["python:nowhere:f"], "ModuleNotFoundError"),
        (["tests"], "no runner of code is given"),
        (["tests:half"], "allowed: tests, tests:share"),
        (["judge:score"], "no judge is given"),
        (["judge:taste"], "allowed: judge:NAME or judge:NAME:VOTES, of reference, score"),
        (["judge:score:0"], "allowed: judge:NAME or judge:NAME:VOTES"),
    ],
)
def test_names_that_are_none_are_one_line(specs: list[str], message: str):
    with pytest.raises(ValueError, match=message) as refused:
        rewards(specs)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("means", "failed", "line"),
    [
        (Means(seconds=0), 0.0, "--reward-seconds is 0; allowed: above 0, below 1e6"),
        (Means(tests_seconds=1e6), 0.0, "tests_seconds is 1000000.0; allowed: above 0"),
        (Means(workers=0), 0.0, "--reward-workers is 0; allowed: 1 to 1024"),
        (Means(), math.nan, "--reward-failed is nan; allowed: at most 1e"),
        (Means(), 1e31, "--reward-failed is 1e+31; allowed: at most 1e"),
    ],
)
def test_means_that_cannot_be_are_refused(means: Means, failed: float, line: str):
    with pytest.raises(ValueError, match=f"^{re.escape(line)}"):
        rewards(["boxed"], means, failed)


# --- functions of the user's own -----------------------------------------------------------------


OWN = """
import os, re, sys, time
def judge(attempt):
    what = attempt.text
    if what == "raises":
        raise LookupError("not\\nthere")
    if what == "hangs":
        while True: time.sleep(1)
    if what == "backtracks":
        re.match("(a+)+$", "a" * 60 + "b")
    if what == "nan":
        return float("nan")
    if what == "exits":
        os._exit(3)
    if what == "leaves":
        sys.exit("now")
    print("printed by a reward")
    return attempt.fields["value"], f"{attempt.prompt} {what}"
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_reward.py").write_text(OWN)
    sys.path.insert(0, str(folder))
    yield "python:own_reward:judge"
    sys.path.remove(str(folder))
    sys.modules.pop("own_reward", None)


def test_rewards_that_raise_hang_or_die_fail_alone_and_the_work_goes_on(own: str):
    whats = ["good", "raises", "hangs", "nan", "good", "exits", "backtracks", "leaves", "good"]
    attempts = [attempt(what, fields={"value": n}) for n, what in enumerate(whats)]
    with rewards([own], Means(seconds=1.5, workers=2), failed=-2.0) as made:
        parts = [one.parts[own] for one in made.rate(attempts)]
        again = made.rate(attempts[:1])[0]
    reasons = {
        "raises": "LookupError: not there",
        "hangs": "took longer than 1.5 s",
        "nan": "the reward returned nan; allowed: a finite number of at most 1e+30 in size, or a "
        "pair of it and a reason",
        "exits": "its process ended with 3",
        "backtracks": "took longer than 1.5 s",
        "leaves": "its process ended with 1",
    }
    for number, (what, part) in enumerate(zip(whats, parts, strict=True)):
        if what == "good":
            assert part == Rated(number, "2 + 2? good")
        else:
            assert part == Rated(-2.0, reasons[what], True)
    assert again == Total(0.0, {own: Rated(0.0, "2 + 2? good")})


def test_workers_stay_for_the_next_batch_and_end_when_they_are_closed():
    workers = Workers("boxed", 20.0, 2)
    first = workers.rate([attempt()] * 8)
    processes = [one._process for one in workers._workers]
    second = workers.rate([attempt("\\boxed{5}"), attempt(reference=None)])
    assert first == [Rated(1.0, "4")] * 8
    assert second == [
        Rated(0.0, "5 differs from the reference"),
        Rated(0.0, "ValueError: the prompt has no reference", True),
    ]
    assert [one._process for one in workers._workers] == processes
    workers.close()
    assert all(process.returncode is not None for process in processes)


# --- statistics ----------------------------------------------------------------------------------


def test_statistics_are_exact():
    attempts = [
        attempt("a \\boxed{1}", tokens=4),
        attempt("a b\n\nc", tokens=2, cut=True),
        attempt("a", reasoning="b"),
        attempt("abc"),
    ]
    totals = [
        Total(1.0, {"x": Rated(1.0), "y": Rated(0.0)}),
        Total(0.0, {"x": Rated(0.0), "y": Rated(0.0, "gone", True)}),
        Total(3.0, {"x": Rated(3.0), "y": Rated(0.0, "gone", True)}),
        Total(0.0, {"x": Rated(0.0), "y": Rated(0.0, "NaN", True)}),
    ]
    found = reward_statistics(attempts, totals)
    assert found["attempts"] == 4
    assert found["failed"] == 3
    assert found["total"] == {
        "count": 4,
        "total": 4.0,
        "mean": 1.0,
        "deviation": math.sqrt(6 / 4),
        "least": 0.0,
        "p50": 0.0,
        "p90": 3.0,
        "p99": 3.0,
        "most": 3.0,
    }
    assert found["parts"]["y"]["failures"] == {"gone": 2, "NaN": 1}
    assert found["parts"]["x"]["failed"] == 0
    assert found["texts"]["tokens"]["mean"] == 3.0
    assert found["texts"]["cut"] == 1
    assert found["texts"]["formats"]["boxed answer"] == 1
    assert found["texts"]["formats"]["reasoning"] == 1
    assert found["texts"]["formats"]["several paragraphs"] == 2
    none = reward_statistics([], [])
    assert (none["total"], none["parts"], none["texts"]["words"]) == (None, {}, None)


def test_style_before_and_after_stands_side_by_side():
    before = style([attempt("a b c d"), attempt("a b")])
    after = style([attempt("\\boxed{1}", cut=True)])
    rows = {name: numbers for name, *numbers in style_table(before, after)}
    assert rows["answers"] == ["2", "1"]
    assert rows["words, mean"] == ["3", "2"]
    assert rows["words, p50"] == ["2", "2"]
    assert rows["characters, most"] == ["7", "9"]
    assert "tokens, mean" not in rows
    assert rows["boxed answer"] == ["0.0%", "100.0%"]
    assert rows["cut"] == ["0.0%", "100.0%"]
    assert style_table(style([]), after)[0] == ("answers", "0", "1")
