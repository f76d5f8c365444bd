"""Prompts of a file, each with its wishes; a fault is told with its line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.inference.prompt_file import Wishes, read_prompts

DEFAULT = Wishes(20, 0.5, 0.9, 7, ("x",))


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_a_line_of_json_overrides_the_wishes_that_it_names(tmp_path: Path):
    everything = {"max_tokens": 3, "temperature": 0, "top_p": 1, "seed": 0, "stop": ["a", "b"]}
    file = write(
        tmp_path / "a.JSONL",
        {"prompt": "one\u2028€", "id": {"any": [1]}},
        {"prompt": "two", "stop": "a", "id": None},
        {"prompt": "three", **everything},
        {"prompt": "", "seed": None},
    )
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n\r\n"))
    one, two, three, four = read_prompts(file, DEFAULT)
    assert (one.text, one.carried, one.wishes) == ("one\u2028€", {"id": {"any": [1]}}, DEFAULT)
    assert (two.carried, two.wishes) == ({"id": None}, replace(DEFAULT, seed=8, stop=("a",)))
    assert (three.carried, three.wishes) == ({}, Wishes(3, 0, 1, 0, ("a", "b")))
    assert (four.text, four.wishes.seed) == ("", 10)


def test_each_line_of_another_file_is_a_prompt(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes('one €\r\n\n{"prompt": 1}\u2028'.encode())
    prompts = read_prompts(tmp_path / "a.txt", replace(DEFAULT, seed=2**32 - 2))
    assert [prompt.text for prompt in prompts] == ["one €", "", '{"prompt": 1}\u2028']
    assert [prompt.wishes.seed for prompt in prompts] == [2**32 - 2, 2**32 - 1, 0]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "no JSON: Expecting property name enclosed in double quotes at column 2"),
        ('{"prompt": "a", "prompt": "b"}', "no JSON that can be read: prompt stands there twice"),
        ("[" * 10**5, "no JSON that can be read: nested too deeply"),
        ('"a"', "'a'; allowed: an object with prompt, max_tokens, temperature, top_p, seed, stop"),
        ('{"id": 1}', "{'id': 1}; allowed: an object with prompt, "),
        ('{"prompt": 1}', "prompt is 1; allowed: text"),
        ('{"prompt": null}', "prompt is None; allowed: text"),
        ('{"prompt": "a", "max_token": 1}', "unknown field 'max_token'; allowed: prompt, max_to"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens is 0; allowed: 1 or more"),
        ('{"prompt": "a", "max_tokens": true}', "max_tokens is True; allowed: a whole number"),
        ('{"prompt": "a", "max_tokens": 1.5}', "max_tokens is 1.5; allowed: a whole number"),
        ('{"prompt": "a", "temperature": "1"}', "temperature is '1'; allowed: a number"),
        ('{"prompt": "a", "temperature": -1}', "temperature is -1; allowed: from 0 to below 1e38"),
        ('{"prompt": "a", "temperature": NaN}', "no JSON that can be read: JSON has no NaN; "),
        ('{"prompt": "a", "id": [-Infinity]}', "no JSON that can be read: JSON has no -Infinity; "),
        ('{"prompt": "a", "id": {"b": 1e400}}', "id is {'b': inf}; allowed: numbers that float64"),
        ('{"prompt": "a", "temperature": 1e400}', "temperature is inf; allowed: from 0"),
        ('{"prompt": "a", "top_p": 2}', "top-p is 2; allowed: above 0, at most 1"),
        ('{"prompt": "a", "seed": -1}', "seed is -1; allowed: 0 to 2^32 - 1"),
        ('{"prompt": "a", "stop": ["b", 1]}', "stop is ['b', 1]; allowed: text, or a list of text"),
        ('{"prompt": "a", "stop": ""}', "a stop string is empty"),
        ('{"prompt": "\\ud800"}', "prompt holds half of a surrogate pair"),
        ('{"prompt": "a", "stop": ["\\udfff"]}', "stop holds half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_told_with_its_number(tmp_path: Path, line: str, said: str):
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"prompt": "good"}}\n\n{line}\n')
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read_prompts(file, DEFAULT)
    assert str(error.value).startswith(f"{file} line 3: {said}")
    assert "\n" not in str(error.value)


def test_a_file_that_holds_no_prompts_or_no_text_is_told(tmp_path: Path):
    for name, content, said in (
        ("a.jsonl", b"\n \n", "a.jsonl holds no prompt; allowed: one or more"),
        ("a.txt", b"\xef\xbb\xbf", "a.txt holds no prompt; allowed: one or more"),
        ("b.txt", b"a\nb\xff\n", "b.txt line 2: byte 0xff is not UTF-8"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=said):
            read_prompts(tmp_path / name, DEFAULT)
    with pytest.raises(OSError, match="No such file"):
        read_prompts(tmp_path / "gone", DEFAULT)
