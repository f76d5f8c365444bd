"""Conversations to fine-tune on: JSON Lines, each an object with `messages` (report 5.1).

Whatever else a line holds (`kind`, `provenance`) is nobody's business here, but for the verdict of
`verification`: what a person has rejected is not learned.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_jax.config.fields import shown
from dsv3_jax.config.plain_json import parse_json
from dsv3_jax.data.jsonl import json_lines, whole_text
from dsv3_jax.data.paths import user_path
from dsv3_jax.data.sources import each_once, entries_of, matching
from dsv3_jax.data.text_files import BadUtf8

ROLES = ("system", "user", "assistant")
_FIELDS = ("role", "content")

Message = dict[str, str]


class Conversation(NamedTuple):
    """Messages of a role and a content each, the last one an answer."""

    name: str
    """`file.jsonl:17`"""
    where: str
    """The same as errors have it"""
    messages: tuple[Message, ...]
    rejected: bool
    """By its verification"""


def read_conversations(
    source: str | tuple[str, ...], bad_utf8: BadUtf8 = "reject"
) -> Iterator[Conversation]:
    """Line by line, files in the order of their names, each once.

    ValueError with file, line and field for what is no conversation: not JSON, no `messages`, an
    unknown role or field, a content that is no text, no answer at the end or an empty one.
    """
    files = each_once(path for entry in entries_of(source) for path in _files(entry))
    for name, path in sorted((path.as_posix(), path) for path in files.values()):
        for number, record in json_lines(path, bad_utf8, parse_json):
            where = f"data.source: {path} line {number}"
            yield _conversation(f"{name}:{number}", where, record, bad_utf8)


def _files(entry: str) -> list[Path]:
    if entry == "stdlib":
        raise ValueError(
            "data.source is stdlib; allowed with data.format messages: files or globs of .jsonl"
        )
    folder = user_path(entry, "data.source")
    if folder.is_dir():
        raise ValueError(
            f"data.source: {folder} is a folder; allowed with data.format messages: files, as in "
            f"'{folder}/**/*.jsonl'"
        )
    paths = matching(entry)
    for path in paths:
        if not path.name.lower().endswith((".jsonl", ".jsonl.gz")):
            raise ValueError(
                f"data.source: {path}; allowed with data.format messages: .jsonl and .jsonl.gz"
            )
    return paths


def _conversation(name: str, where: str, record: Any, bad_utf8: BadUtf8) -> Conversation:
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        found = record.get("messages", "missing") if isinstance(record, dict) else record
        raise ValueError(
            f"{where}: messages is {shown(found)}; allowed: an object with a list of messages"
        )
    messages = tuple(
        _message(f"{where}: messages[{place}]", message, bad_utf8)
        for place, message in enumerate(record["messages"])
    )
    _check_answers(where, messages)
    verification = record.get("verification")
    verdict = verification.get("verdict") if isinstance(verification, dict) else None
    return Conversation(name, where, messages, verdict == "rejected")


def _message(where: str, found: Any, bad_utf8: BadUtf8) -> Message:
    allowed = "an object with role and content"
    if not isinstance(found, dict):
        raise ValueError(f"{where} is {shown(found)}; allowed: {allowed}")
    for name in _FIELDS:
        if not isinstance(found.get(name), str):
            value = shown(found[name]) if name in found else "missing"
            raise ValueError(f"{where}.{name} is {value}; allowed: text")
    unknown = sorted(set(found) - set(_FIELDS))
    if unknown:  # a weight, a tool call: to pass over it would be to learn something else
        raise ValueError(f"{where} has a field {unknown[0]!r}; allowed: {allowed}, nothing else")
    if found["role"] not in ROLES:
        raise ValueError(
            f"{where}.role is {shown(found['role'])}; allowed: {', '.join(map(repr, ROLES))}"
        )
    content = whole_text(
        f"{where}.content".removeprefix("data.source: "), found["content"], bad_utf8
    )
    return {"role": found["role"], "content": content}


def _check_answers(where: str, messages: tuple[Message, ...]) -> None:
    """ValueError without an answer at the end, or with one that says nothing."""
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where}: messages holds no answer; allowed: one of role 'assistant'")
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{where}: messages[{len(messages) - 1}].role is {messages[-1]['role']!r}; allowed: "
            "the last message is an answer, of role 'assistant'"
        )
    for place, message in enumerate(messages):
        if message["role"] == "assistant" and not message["content"].strip():
            raise ValueError(f"{where}: messages[{place}].content is an answer without a word")
