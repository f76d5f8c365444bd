"""What samples are made from: the lines of a file of prompts, each rendered for every kind that it
becomes. A fault of any line is told before a model is opened.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_jax.config.fields import shown
from dsv3_jax.posttrain.json_lines import json_of, numbered_lines
from dsv3_jax.posttrain.templates import EXPANDED, VERSION, Template, check_kind

Messages = list[dict[str, str]]
ROLES = ("system", "user", "assistant")
_FIELDS = ("prompt", "messages", "id", "reference", "response", "kind", "values")


@dataclass(frozen=True)
class Problem:
    """One thing to be answered, for one kind of sample."""

    id: str
    """The line's `id`, else its number"""
    kind: str
    where: str
    """File and line, for messages"""
    prompt: str
    """As the line has it; of a conversation, the last user's turn"""
    messages: Messages
    """What the model is asked, and what the sample holds before its answer"""
    reference: str | None
    response: str | None
    """The line's own answer, for the kind `reasoning_original`: nothing is asked then"""
    template: Mapping[str, str]
    """Kind, version and hash"""
    keeps_reasoning: bool

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from all others."""
        return self.id, self.kind

    @property
    def hash(self) -> str:
        """SHA-256 of what is asked, in hexadecimal."""
        text = json.dumps([self.messages, self.reference, self.response], ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


def read_problems(
    file: Path, templates: Mapping[str, Template], kind: str | None, values: Mapping[str, str]
) -> list[Problem]:
    """Of an object a line, blank lines aside: `prompt` or `messages`, and as far as wished `id`,
    `reference`, `response`, `kind` (default: the argument) and `values` for the templates.

    ValueError, one line, with file and line, for what is no UTF-8, no JSON, no field of ours, of a
    wrong type or kind, for a template that fails, an id that comes twice, and for a file without
    prompts. OSError for one that cannot be read.
    """
    problems, lines = [], {}
    for number, line in numbered_lines(file):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        try:
            made = list(_problems(line, number, where, templates, kind, values))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        for problem in made:
            first = lines.setdefault(problem.key, number)
            if first != number:
                raise ValueError(f"{where}: id is {shown(problem.id)}, as of line {first}")
        problems += made
    if not problems:
        raise ValueError(f"{file} holds no prompt; allowed: one or more")
    return problems


def _problems(
    line: str,
    number: int,
    where: str,
    templates: Mapping[str, Template],
    default: str | None,
    values: Mapping[str, str],
) -> Iterator[Problem]:
    found = _fields(line)
    kind = found.get("kind", default)
    if kind is None:
        raise ValueError(f"no kind; allowed as kind or as --kind: {', '.join(EXPANDED)}")
    turns = turns_of(found)
    named = {**values, **_values(found.get("values", {}))}
    for each in EXPANDED[check_kind(kind)]:
        template = templates[each]
        system, user = template.render(turns[-1]["content"], named)
        messages = [*turns[:-1], {"role": "user", "content": user}]
        if system and messages[0]["role"] != "system":  # a conversation may bring its own
            messages = [{"role": "system", "content": system}, *messages]
        yield Problem(
            id=id_of(found, number),
            kind=each,
            where=where,
            prompt=turns[-1]["content"],
            messages=messages,
            reference=text_or_none(found, "reference"),
            response=text_or_none(found, "response") if each == EXPANDED["reasoning"][0] else None,
            template={"kind": each, "version": VERSION, "hash": template.hash},
            keeps_reasoning=template.keeps_reasoning,
        )


def _fields(line: str) -> dict[str, Any]:
    found = json_of(line)
    if not isinstance(found, dict):
        raise ValueError(f"{shown(found)}; allowed: an object with {', '.join(_FIELDS)}")
    for name in found:
        if name not in _FIELDS:
            raise ValueError(f"unknown field {shown(name)}; allowed: {', '.join(_FIELDS)}")
    return found


def id_of(found: Mapping[str, Any], number: int) -> str:
    """A line's `id`, else its number. ValueError, one line, for what is none."""
    if type(found.get("id", "")) not in (str, int) or found.get("id") == "":
        raise ValueError(f"id is {shown(found['id'])}; allowed: text or a whole number")
    return str(found.get("id", number))


def turns_of(found: Mapping[str, Any]) -> Messages:
    """Of a line's `prompt` or `messages`, a conversation whose last turn is a user's. ValueError,
    one line, for what is none.
    """
    if ("prompt" in found) == ("messages" in found):
        raise ValueError("one of prompt and messages is needed, and no two")
    if "prompt" in found:
        return [{"role": "user", "content": _text("prompt", found["prompt"])}]
    turns = found["messages"]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"messages is {shown(turns)}; allowed: a list of one turn or more")
    read = [_turn(f"messages[{place}]", turn) for place, turn in enumerate(turns)]
    if read[-1]["role"] != "user":
        last = len(read) - 1
        raise ValueError(f"messages[{last}].role is {shown(read[-1]['role'])}; allowed last: user")
    return read


def _turn(where: str, turn: Any) -> dict[str, str]:
    if not isinstance(turn, dict) or turn.keys() != {"role", "content"}:
        raise ValueError(f"{where} is {shown(turn)}; allowed: an object with role and content")
    if turn["role"] not in ROLES:
        raise ValueError(f"{where}.role is {shown(turn['role'])}; allowed: {', '.join(ROLES)}")
    return {"role": turn["role"], "content": _text(f"{where}.content", turn["content"])}


def _values(found: Any) -> dict[str, str]:
    if not isinstance(found, dict):
        raise ValueError(f"values is {shown(found)}; allowed: an object of texts")
    return {name: _text(f"values.{name}", value) for name, value in found.items()}


def text_or_none(found: Mapping[str, Any], name: str) -> str | None:
    """A field of a line. ValueError, one line, for what is no text."""
    return None if found.get(name) is None else _text(name, found[name])


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is {shown(value)}; allowed: text that is not empty")
    # JSON can spell halves of surrogate pairs, which no UTF-8 has: \ud800 alone.
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"{name} holds half of a surrogate pair; allowed: what UTF-8 can hold")
    return value


def check_references(
    problems: Sequence[Problem], name: str, check: Callable[[str], Any] = str
) -> None:
    """ValueError for the first problem that a verifier has nothing to compare with: without a
    reference, or with one that `check` raises a ValueError for.
    """
    for problem in problems:
        if problem.reference is None:
            raise ValueError(f"{problem.where}: no reference; --verifier {name} compares with one")
        try:
            check(problem.reference)
        except ValueError as error:
            raise ValueError(
                f"{problem.where}: reference is {shown(problem.reference)}; --verifier {name}: "
                f"{error}"
            ) from None
