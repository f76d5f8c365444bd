"""Prompts out of a file: JSON Lines with wishes of their own, or one prompt a line.

A fault of any line is told before a model is read.
"""

import codecs
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dsv3_jax.config.fields import shown
from dsv3_jax.config.plain_json import parse_json
from dsv3_jax.inference.sampling import check_sampling
from dsv3_jax.inference.text import TextStream


@dataclass(frozen=True)
class Wishes:
    """How a text goes on."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Strings before which it ends"""

    def check(self) -> None:
        """ValueError, one line, for what cannot be done."""
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; allowed: 1 or more")
        check_sampling(self.seed, self.temperature, self.top_p)
        TextStream((), self.stop)


@dataclass(frozen=True)
class Prompt:
    """A text to go on with."""

    text: str
    wishes: Wishes
    carried: Mapping[str, Any]
    """The line's `id`, if it has one"""


_KINDS = {
    "prompt": ((str,), "text"),
    "max_tokens": ((int,), "a whole number"),
    "temperature": ((int, float), "a number"),
    "top_p": ((int, float), "a number"),
    "seed": ((int,), "a whole number"),
    "stop": ((str, list), "text, or a list of text"),
}
_NAMES = ", ".join((*_KINDS, "id"))
SEEDS = 2**32


def read_prompts(file: Path, default: Wishes) -> list[Prompt]:
    """Of a `.jsonl` file an object a line, blank lines aside; of any other a prompt a line.

    What a line does not wish is `default`, with the prompt's number added to the seed. ValueError,
    one line, with file and line number, for what is no UTF-8, no JSON, no field of ours, of a wrong
    type or out of range; and for a file without prompts. OSError for one that cannot be read.
    """
    content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    if not content.strip():
        raise ValueError(f"{file} holds no prompt; allowed: one or more")
    try:
        lines = content.decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{file} line {number}: byte {content[error.start]:#04x} is not UTF-8"
        ) from None
    is_json, prompts = file.suffix.lower() == ".jsonl", []
    for number, line in enumerate(lines, start=1):
        if is_json and not line.strip():
            continue
        seeded = replace(default, seed=(default.seed + len(prompts)) % SEEDS)
        try:
            found = _fields(line) if is_json else {"prompt": line.removesuffix("\r")}
            prompts.append(_prompt(found, seeded))
        except ValueError as error:
            raise ValueError(f"{file} line {number}: {error}") from None
    return prompts


def _prompt(found: Mapping[str, Any], default: Wishes) -> Prompt:
    given = {field.name: found.get(field.name) for field in fields(Wishes)}
    given = {name: value for name, value in given.items() if value is not None}
    if "stop" in given:
        stop = given["stop"]
        given["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    wishes = replace(default, **given)
    wishes.check()
    return Prompt(found["prompt"], wishes, {"id": found["id"]} if "id" in found else {})


def _fields(line: str) -> dict[str, Any]:
    """Of a line of JSON, every one of its type."""
    try:
        found = parse_json(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:  # a name twice, brackets too deep, numbers too long
        raise ValueError(f"no JSON that can be read: {error}") from None
    if not isinstance(found, dict) or "prompt" not in found:
        raise ValueError(f"{shown(found)}; allowed: an object with {_NAMES}, the first in any case")
    for name, value in found.items():
        if name not in (*_KINDS, "id"):
            raise ValueError(f"unknown field {shown(name)}; allowed: {_NAMES}")
        if name == "id":
            _check_carried(value)
        else:
            _check(name, value)
    return found


def _check_carried(value: Any) -> None:
    """1e400 is JSON, and infinite where it is read: written again it would be none."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError(f"id is {shown(value)}; allowed: numbers that float64 holds") from None


def _check(name: str, value: Any) -> None:
    """Null stands for what is not there, but for a prompt."""
    kinds, allowed = _KINDS[name]
    if value is None and name != "prompt":
        return
    texts = value if isinstance(value, list) else [value] if isinstance(value, str) else []
    if type(value) not in kinds or not all(type(text) is str for text in texts):
        raise ValueError(f"{name} is {shown(value)}; allowed: {allowed}")
    for text in texts:
        # JSON can spell halves of surrogate pairs, which no UTF-8 has: \ud800 alone.
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"{name} holds half of a surrogate pair; allowed: what UTF-8 can hold")
