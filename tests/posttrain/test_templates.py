"""Kinds of samples render as the report describes them; a template that fails is one line."""

import json
from pathlib import Path

import pytest

from dsv3_jax.posttrain.templates import EXPANDED, TEMPLATES, Template, check_kind, read_templates


def test_a_problem_becomes_the_reports_two_samples():
    original, reflective = (TEMPLATES[kind] for kind in EXPANDED["reasoning"])
    assert original.render("1 + 1?", {}) == ("", "1 + 1?")
    system, user = reflective.render("1 + 1?", {})
    assert user == "1 + 1?"
    assert "look back" in system
    assert "\\boxed{}" in system
    assert reflective.keeps_reasoning
    assert not original.keeps_reasoning


def test_all_other_kinds_have_a_system_prompt_and_their_values():
    values = {"name": "Ada", "developer": "us", "language": "German"}
    for kind in TEMPLATES.keys() - EXPANDED["reasoning"]:
        system, user = TEMPLATES[kind].render("one\n", values)
        assert system
        assert user.endswith("one\n")
    assert "Ada, a language model made by us" in TEMPLATES["self_cognition"].render("?", values)[0]
    assert TEMPLATES["translation"].render("x", values)[1] == "Translate into German:\n\nx"


def test_a_prompt_is_no_template_itself():
    assert TEMPLATES["writing"].render("{{ 1 + 1 }} <&>", {})[1] == "{{ 1 + 1 }} <&>"


def test_a_value_that_is_missing_is_named():
    with pytest.raises(ValueError, match=r"its user template fails: 'language' is undef.*prompt$"):
        TEMPLATES["translation"].render("x", {})


ENDLESS = "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}"
HUGE = "{{ prompt * 2 ** 60 }}"


@pytest.mark.parametrize(
    "source", ["{{ prompt / 2 }}", "{{ prompt[0](1) }}", "{{ 1 // 0 }}", ENDLESS, HUGE]
)
def test_a_template_that_fails_is_one_line(source: str):
    with pytest.raises(ValueError, match="its user template fails: ") as failed:
        Template(user=source).render("x", {})
    assert "\n" not in str(failed.value)


def test_a_template_that_asks_nothing_is_refused():
    with pytest.raises(ValueError, match="its user template gives no text; allowed: one that asks"):
        Template(user="{% if false %}{{ prompt }}{% endif %}\n").render("x", {})


def test_a_template_cannot_reach_into_python():
    with pytest.raises(ValueError, match="unsafe"):
        Template(user="{{ prompt.__class__.__mro__ }}").render("x", {})


def test_own_templates_take_the_places_of_ours(tmp_path: Path):
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"writing": {"system": "s", "keeps_reasoning": True}}))
    found = read_templates(file)
    assert found["writing"] == Template("s", "{{ prompt }}", True)
    assert found["translation"] is TEMPLATES["translation"]
    assert found["writing"].hash != TEMPLATES["writing"].hash


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "no table of fields"),
        ("{", "not JSON"),
        ('{"poem": {}}', "kind 'poem' is unknown; allowed: reasoning_original, "),
        ('{"writing": 1}', "writing is 1; allowed: an object with system, user"),
        ('{"writing": {"users": ""}}', "writing.users is unknown; allowed: system, user"),
        ('{"writing": {"user": 1}}', "writing.user is 1; allowed: text"),
        ('{"writing": {"keeps_reasoning": 1}}', "keeps_reasoning is 1; allowed: true, false"),
        ('{"writing": {"user": "{{ prompt"}}', "writing.user is no template: "),
    ],
)
def test_a_file_that_is_none_of_templates_is_one_line(tmp_path: Path, content: str, said: str):
    file = tmp_path / "own.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"own\.json: ") as failed:
        read_templates(file)
    assert said in str(failed.value)


def test_an_unknown_kind_is_told_with_those_that_are():
    assert check_kind("reasoning") == "reasoning"
    for kind in ("poem", 1, None, []):
        with pytest.raises(ValueError, match=r"allowed: reasoning, reasoning_original, .*transl"):
            check_kind(kind)
