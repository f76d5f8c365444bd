"""Prompts to be rewarded for: what a line becomes, what is told of a bad one, and their order."""

import json
import re
from pathlib import Path

import pytest

from dsv3_jax.data.chat import ChatTemplate
from dsv3_jax.posttrain.rl_prompts import chosen, encode_prompts, read_prompts
from tests.chat_tokenizer import chat_tokenizer

USER = {"role": "user", "content": "and 3?"}


def file_of(tmp_path: Path, *lines: dict | str) -> Path:
    file = tmp_path / "prompts.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("".join(f"{text}\n" for text in texts))
    return file


def test_a_line_keeps_what_rewards_look_at(tmp_path: Path):
    turns = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "2."}, USER]
    one, two = read_prompts(
        file_of(
            tmp_path,
            {"prompt": "1+1", "reference": "2", "tests": ["f(1) == 2"], "kind": "code"},
            "",
            {"messages": turns, "id": 7, "kind": 3},
        )
    )
    assert (one.id, one.prompt, one.reference, one.kind) == ("1", "1+1", "2", "code")
    assert one.messages == [{"role": "user", "content": "1+1"}]
    assert one.fields == {"tests": ["f(1) == 2"], "kind": "code"}
    assert (two.id, two.prompt, two.reference, two.kind) == ("7", "and 3?", None, "")
    assert two.messages == turns
    assert two.where == f"{tmp_path / 'prompts.jsonl'} line 3"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "no JSON: "),
        (b"[1]", "[1]; allowed: an object with prompt or messages"),
        (b'{"prompt": "\xff"}', "byte 0xff is not UTF-8"),
        (b'{"prompt": "a", "prompt": "b"}', "no JSON that can be read: prompt stands there twice"),
        (b'{"tests": []}', "one of prompt and messages is needed, and no two"),
        (b'{"prompt": 1}', "prompt is 1; allowed: text"),
        (b'{"prompt": "a", "reference": 4}', "reference is 4; allowed: text"),
        (b'{"prompt": "a", "id": 1.5}', "id is 1.5; allowed: text or a whole number"),
        (b'{"prompt": "a", "id": "first"}', "id is 'first', as of line 1"),
        (b'{"messages": [{"role": "user"}]}', "messages[0] is {'role': 'user'}; allowed: an obj"),
        (
            b'{"messages": [{"role": "assistant", "content": "a"}]}',
            "messages[0].role is 'assistant'; allowed last: user",
        ),
    ],
)
def test_a_fault_is_told_with_file_line_and_field(tmp_path: Path, line: bytes, said: str):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'{"prompt": "good", "id": "first"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=re.escape(f"{file} line 2: {said}")) as error:
        read_prompts(file)
    assert "\n" not in str(error.value)


def test_a_file_without_prompts_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no prompt; allowed: one or more"):
        read_prompts(file_of(tmp_path, ""))


def test_prompts_are_what_a_model_is_asked_with_and_longer_ones_are_dropped(tmp_path: Path):
    template = ChatTemplate(chat_tokenizer())
    lines = [{"prompt": "1+1"}, {"prompt": "1" * 40}, {"prompt": "2+2"}]
    prompts = read_prompts(file_of(tmp_path, *lines))
    found = encode_prompts(prompts, template, room=6)
    assert found.prompts == (prompts[0], prompts[2])
    asked = [tuple(template.encode([{"role": "user", "content": t}])) for t in ("1+1", "2+2")]
    assert list(found.tokens) == asked
    assert (found.dropped, found.longest) == (1, 6)
    with pytest.raises(ValueError, match="all 3 prompts are too long, the shortest of 6 tokens; "):
        encode_prompts(prompts, template, room=5)


def test_what_the_template_refuses_is_told_with_its_line(tmp_path: Path):
    template = ChatTemplate(chat_tokenizer(), "{{ raise_exception('no') }}", "a template")
    with pytest.raises(ValueError, match=r"prompts.jsonl line 1: a template: no"):
        encode_prompts(read_prompts(file_of(tmp_path, {"prompt": "a"})), template, 99)


def test_the_hash_is_of_all_that_is_asked_and_how_and_not_of_where_it_lies(tmp_path: Path):
    template = ChatTemplate(chat_tokenizer())
    (tmp_path / "other").mkdir()

    def hash_of(folder: Path, line: dict, template: ChatTemplate = template) -> str:
        return encode_prompts(read_prompts(file_of(folder, line)), template, 99).content_hash

    line = {"prompt": "a", "reference": "b"}
    first = hash_of(tmp_path, line)
    assert first == hash_of(tmp_path / "other", line)
    plain = ChatTemplate(chat_tokenizer(), "{{ messages[0].content }}")
    others = [hash_of(tmp_path, line | change) for change in ({"prompt": "c"}, {"reference": "c"})]
    others += [hash_of(tmp_path, line | {"cases": [1]}), hash_of(tmp_path, line, plain)]
    assert len({first, *others}) == 5


@pytest.mark.parametrize("count", [1, 3, 8, 11])
def test_all_prompts_come_once_an_epoch_each_in_an_order_of_its_own(count: int):
    numbers = [n for batch in range(24) for n in chosen(8, 5, batch, count)]
    epochs = [numbers[i : i + 8] for i in range(0, 24 * count - 7, 8)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert chosen(8, 6, 0, 8) != chosen(8, 5, 0, 8) == numbers[:8]
