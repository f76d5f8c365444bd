"""Verifiers: what each accepts, that one that raises rejects, and faults of their names."""

import sys
from pathlib import Path

import pytest

from dsv3_jax.posttrain.completions import Completion
from dsv3_jax.posttrain.verifiers import Verdict, boxed, judged, same_value, verifiers
from tests.posttrain.scripted_models import problem


def verdict(spec: str, text: str, reference: str | None = None, **changes) -> Verdict:
    found, _ = judged(problem(reference=reference, **changes), Completion(text), verifiers([spec]))
    return found


@pytest.mark.parametrize(
    ("spec", "text", "reference", "accepted"),
    [
        ("exact", " Paris\n", "paris", True),
        ("exact", "Paris.", "Paris", False),
        ("exact", "10⁵", "105", False),
        ("exact", "x²", "x2", False),
        ("exact", "Ａ１", "a1", True),
        ("boxed", "so \\boxed{4}", "4", True),
        ("boxed", "so \\boxed{4}", "so it is \\boxed{4}", True),
        ("boxed", "so 4", "4", False),
        ("boxed", "\\boxed{4} no, \\boxed{5}", "5", True),
        ("boxed", "\\boxed{4} no, \\boxed{5}", "4", False),
        ("proof", "2. q | p by or_right 1", "p |- q | p", True),
        ("proof", "2. q | p by or_right 1", "p |- q | r", False),
        ("proof", "2. q | p by or_right 1", "p |- q | ", False),
        ("regex:^a.*z$", "a\nz", None, True),
        ("regex:^a.*z$", "b", None, False),
        ("regex", "The year 1789.", r"\b1789\b", True),
        ("regex", "The year 17890.", r"\b1789\b", False),
        ("json", '{"a": 1}', None, True),
        ("json", '```json\n{"a": 1}\n```', None, True),
        ("json", "no", None, False),
        ("json", "```json \n\n[1]\n\n```", None, True),
        ("json", "```[1]```", None, False),
        ("json", "```json" + "\n" * 100_000 + "x", None, False),
        ("json:a,b", '{"a": 1, "b": 2}', None, True),
        ("json:a,b", '{"a": 1}', None, False),
        ("json:a", "[1]", None, False),
        ("words:2-3", "one two three", None, True),
        ("words:2-3", "one", None, False),
        ("python:math:isnan", "text", None, False),
    ],
)
def test_what_is_accepted(spec: str, text: str, reference: str | None, accepted: bool):
    assert verdict(spec, text, reference).accepted is accepted


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("\\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed {a}", "a"),
        ("\\boxed{a\\}b}", "a\\}b"),
        ("\\boxed{\\boxed{1} 2}", "1"),
        ("} {\\boxed{x}", "x"),
        ("\\boxed{1} \\boxed{2", "1"),
        ("\\boxed{", None),
        ("\\fbox{1}", None),
        ("boxed{1}", None),
    ],
)
def test_the_last_box_whose_braces_close_is_the_answer(text: str, inside: str | None):
    assert boxed(text) == inside


def test_boxes_without_end_are_read_in_one_pass():
    assert boxed("\\boxed{" * 20_000) is None
    assert boxed("\\boxed{" * 20_000 + "}" * 20_000) == ""


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("0.5", "\\frac{1}{2}", True),
        ("1/2", "\\dfrac{1}{2}", True),
        ("-.5", "-0.50", True),
        ("50\\%", "0.5", True),
        ("1,234", "1234", True),
        ("1{,}234", "1234.", True),
        ("1,23", "123", False),
        ("\\left( 1, 2 \\right)", "(1,2)", True),
        ("\\text{Paris}", "Paris", True),
        ("$x^2$", "x ^ 2", True),
        ("1/0", "1/0", True),
        ("1/0", "2/0", False),
        ("x", "y", False),
        ("", "0", False),
        ("9" * 101, "9" * 102, False),
        ("1\\frac{1}{2}", "5.5", False),
        ("1\\frac{1}{2}", "1.5", True),
        ("-1 \\tfrac{1}{2}", "-1.5", True),
        ("2\\,\\frac34", "11/4", True),
        ("1 1/2", "5.5", False),
        ("1 1/2", "11/2", False),
        ("1 1/2", "1\\frac{1}{2}", True),
        ("1.5\\frac{1}{2}", "2", False),
        ("1 2", "3", False),
        ("12 % 5", "12 %5", True),
        ("3\\frac12\\%", "0.035", True),
        ("\\frac12", "0.5", True),
        ("\\frac 1{2}", "\\frac{1}2", True),
        ("x\\dfrac12", "x\\frac{1}{2}", True),
        ("1\\,234", "1234", True),
        ("1,\\!234{,}567", "1234567", True),
        ("1\\,23", "123", False),
        ("1 234", "1234", False),
        ("1, 234", "1234", False),
        ("3, 100", "3100", False),
        ("(3, 100)", "(3,100)", True),
        ("1 2", "12", False),
        ("$1$ $2$", "12", False),
        ("1. 5", "1.5", False),
        ("5 \\text{ cm}", "5cm", True),
        ("No. 5", "No.5", True),
        ("1" + " " * 100_000, "1", True),
        ("x \\rightarrow 0", "x \\leftarrow 0", False),
    ],
)
def test_values_are_the_same_as_text_or_as_numbers(one: str, other: str, same: bool):
    assert same_value(one, other) is same
    assert same_value(other, one) is same


def test_a_cut_or_empty_answer_is_rejected_before_any_verifier():
    judges = verifiers(["python:builtins:bool"])
    for completion, note, name in (
        (Completion("text", cut=True), "its length ended it", "cut at its length"),
        (Completion(" \n"), "it is empty", "empty"),
    ):
        assert judged(problem(), completion, judges) == (Verdict(False, note), name)
    assert judged(problem(), Completion("text"), []) == (None, None)


def test_all_verifiers_of_a_kind_must_accept_and_the_first_that_does_not_is_named():
    judges = verifiers(["words:1-5", "writing=words:1-1", "regex:b"])
    assert judged(problem(), Completion("a b"), judges) == (
        Verdict(True, "2 words"),
        "words:1-5, regex:b",
    )
    assert judged(problem(kind="writing"), Completion("a b"), judges)[1] == "writing=words:1-1"
    assert judged(problem(), Completion("a"), judges)[1] == "regex:b"
    assert judged(problem(), Completion("a"), judges[1:2]) == (None, None)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own_judge.py").write_text(
        "limit = 3\n"
        "def raises(answer):\n    raise LookupError('not\\nthere')\n"
        "def pair(answer):\n    return answer.text == answer.reference, answer.id\n"
        "def model(answer):\n    return {'accepted': True, 'note': answer.kind, 'by': 'model'}\n"
        "def nothing(answer):\n    pass\n"
        "def leaves(answer):\n    raise SystemExit(3)\n"
        "def half(answer):\n    return False, 'so \\ud800'\n"
        "def wrong(answer):\n    return {'accepted': True, 'by': 'me'}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    yield
    sys.modules.pop("own_judge", None)


@pytest.mark.usefixtures("own")
def test_a_users_own_function_judges():
    assert verdict("python:own_judge:pair", "2", "2") == Verdict(True, "1")
    said = verdict("python:own_judge:model", "2")
    assert said == Verdict(True, "reasoning_original", "model")
    both = judged(problem(), Completion("2"), verifiers(["python:own_judge:model", "words:1-1"]))[0]
    assert both == Verdict(True, "reasoning_original; 1 words", "model")


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("raises", "LookupError: not there"),
        ("nothing", "TypeError: the verifier returned None; allowed: a bool, "),
        ("wrong", "TypeError: the verifier returned {"),
        ("leaves", "SystemExit: 3"),
        ("half", "so ?"),
    ],
)
def test_a_function_that_raises_or_says_nothing_has_rejected(name: str, note: str):
    said = verdict(f"python:own_judge:{name}", "2")
    assert not said.accepted
    assert said.note.startswith(note)


def test_a_pattern_in_a_reference_that_is_none_rejects_with_its_reason():
    said = verdict("regex", "text", "(")
    assert not said.accepted
    assert "missing )" in said.note


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("boxd", "--verifier is 'boxd'; allowed: exact, boxed, proof, "),
        ("poem=boxed", "--verifier is 'poem=boxed'; allowed: exact"),
        ("exact:1", "--verifier is 'exact:1'; allowed: exact"),
        ("writing=", "--verifier is 'writing='; allowed: exact"),
        ("regex:(", "--verifier 'regex:(': no regular expression: "),
        ("words:3-2", "allowed: words:LEAST-MOST"),
        ("words", "allowed: words:LEAST-MOST"),
        ("python:own_judge", "allowed: python:module:function"),
        ("python:gone:f", "ModuleNotFoundError: No module named 'gone'"),
        ("python:own_judge:f", "AttributeError: "),
        ("python:own_judge:limit", "limit is 3; allowed: a function of one answer"),
    ],
)
def test_a_name_that_is_none_is_one_line(spec: str, said: str):
    with pytest.raises(ValueError, match="--verifier ") as failed:
        verifiers([spec])
    assert said in str(failed.value)
    assert "\n" not in str(failed.value)
