"""A file of prompts: what each line becomes, and one line with its number for each fault."""

from pathlib import Path

import pytest

from dsv3_jax.posttrain.problems import check_references, read_problems
from dsv3_jax.posttrain.templates import TEMPLATES
from dsv3_jax.posttrain.verifiers import verifiers
from tests.posttrain.scripted_models import problems_of

USER = {"role": "user", "content": "and 3?"}


def test_reasoning_becomes_two_problems_and_other_kinds_one(tmp_path: Path):
    lines = (
        {"prompt": "2?", "kind": "reasoning", "response": "two", "reference": "2", "id": "a"},
        {"prompt": "3?"},
        {"prompt": "x", "kind": "translation", "values": {"language": "German"}, "id": 7},
    )
    found = problems_of(tmp_path, *lines)
    assert [one.key for one in found] == [
        ("a", "reasoning_original"),
        ("a", "reasoning_reflective"),
        ("2", "reasoning_original"),
        ("7", "translation"),
    ]
    original, reflective, plain, translation = found
    assert original.messages == [{"role": "user", "content": "2?"}]
    assert [one["role"] for one in reflective.messages] == ["system", "user"]
    assert (original.response, reflective.response, plain.response) == ("two", None, None)
    assert original.reference == reflective.reference == "2"
    assert translation.prompt == "x"
    assert translation.messages[-1]["content"] == "Translate into German:\n\nx"
    assert len({one.hash for one in found}) == 4


def test_a_conversation_keeps_its_turns_and_its_own_system_prompt(tmp_path: Path):
    turns = [
        {"role": "user", "content": "2?"},
        {"role": "assistant", "content": "2."},
        USER,
    ]
    own = [{"role": "system", "content": "mine"}, USER]
    one, two = problems_of(tmp_path, {"messages": turns}, {"messages": own}, kind="writing")
    assert one.messages[1:] == turns
    assert one.messages[0]["role"] == "system"
    assert two.messages == own
    assert one.prompt == two.prompt == "and 3?"


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path: Path):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n  \n{"prompt": "b"}')
    assert [one.id for one in read_problems(file, TEMPLATES, "writing", {})] == ["1", "4"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "no JSON: "),
        (b'{"prompt": "a", "prompt": "b"}', "no JSON that can be read: prompt stands there twice"),
        (b'{"prompt": "\xff"}', "byte 0xff is not UTF-8"),
        (b"[1]", "[1]; allowed: an object with prompt, messages"),
        (b'{"prompt": "a", "promt": 1}', "unknown field 'promt'; allowed: prompt, messages"),
        (b"{}", "one of prompt and messages is needed, and no two"),
        (b'{"prompt": "a", "messages": []}', "one of prompt and messages is needed, and no two"),
        (b'{"prompt": " "}', "prompt is ' '; allowed: text that is not empty"),
        (b'{"prompt": 1}', "prompt is 1; allowed: text"),
        (b'{"prompt": "\\ud800"}', "prompt holds half of a surrogate pair"),
        (b'{"prompt": "a", "id": 1.5}', "id is 1.5; allowed: text or a whole number"),
        (b'{"prompt": "a", "id": true}', "id is True; allowed"),
        (b'{"prompt": "a", "reference": 4}', "reference is 4; allowed: text"),
        (b'{"prompt": "a", "kind": "poem"}', "kind is 'poem'; allowed: reasoning, "),
        (b'{"prompt": "a", "kind": "translation"}', "its user template fails: 'language'"),
        (b'{"prompt": "a", "values": 1}', "values is 1; allowed: an object of texts"),
        (b'{"prompt": "a", "values": {"n": 1}}', "values.n is 1; allowed: text"),
        (b'{"messages": []}', "messages is []; allowed: a list of one turn or more"),
        (b'{"messages": [1]}', "messages[0] is 1; allowed: an object with role and content"),
        (
            b'{"messages": [{"role": "tool", "content": "a"}]}',
            "messages[0].role is 'tool'; allowed: system, user, assistant",
        ),
        (
            b'{"messages": [{"role": "assistant", "content": "a"}]}',
            "messages[0].role is 'assistant'; allowed last: user",
        ),
        (b'{"messages": [{"role": "user", "content": 3}]}', "messages[0].content is 3; allowed"),
        (b'{"prompt": "b", "id": "1"}', "id is '1', as of line 1"),
    ],
)
def test_a_fault_is_told_with_file_line_and_field(tmp_path: Path, line: bytes, said: str):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'{"prompt": "fine"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"p\.jsonl line 3: ") as failed:
        read_problems(file, TEMPLATES, "writing", {})
    assert said in str(failed.value)
    assert "\n" not in str(failed.value)


def test_a_line_without_a_kind_and_a_file_without_lines_are_told(tmp_path: Path):
    with pytest.raises(ValueError, match="line 1: no kind; allowed as kind or as --kind: reason"):
        problems_of(tmp_path, {"prompt": "a"}, kind=None)
    with pytest.raises(ValueError, match="holds no prompt; allowed: one or more"):
        problems_of(tmp_path)


def test_what_a_verifier_compares_with_is_missed_by_file_and_line(tmp_path: Path):
    found = problems_of(tmp_path, {"prompt": "a", "reference": "1"}, {"prompt": "b"})
    check_references(found[:1], "boxed")
    with pytest.raises(ValueError, match=r"prompts.jsonl line 2: no reference; --verifier boxed"):
        check_references(found, "boxed")


def test_a_reference_that_a_verifier_cannot_use_is_told_before_a_model_is_asked(tmp_path: Path):
    found = problems_of(
        tmp_path, {"prompt": "a", "reference": "1"}, {"prompt": "b", "reference": "("}
    )
    (judge,) = verifiers(["regex"])
    check_references(found[:1], judge.name, judge.check_reference)
    said = r"prompts.jsonl line 2: reference is '\('; --verifier regex: no regular expression"
    with pytest.raises(ValueError, match=said):
        check_references(found, judge.name, judge.check_reference)
