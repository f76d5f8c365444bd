"""Prompts that a model is rewarded for answering: lines of a file, encoded, chosen batch by batch.

A fault of any line is told before a model is opened.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsv3_jax.config.fields import shown
from dsv3_jax.data.cache import hash_texts
from dsv3_jax.data.chat import ChatTemplate
from dsv3_jax.data.hashing import key64
from dsv3_jax.data.shuffle import shuffled
from dsv3_jax.posttrain.json_lines import json_of, numbered_lines
from dsv3_jax.posttrain.problems import Messages, id_of, text_or_none, turns_of

_OWN = ("id", "prompt", "messages", "reference")


@dataclass(frozen=True)
class RLPrompt:
    """One of them."""

    id: str
    """The line's `id`, else its number"""
    where: str
    """File and line, for messages"""
    prompt: str
    """The last user's turn"""
    messages: Messages
    """What the model is asked"""
    reference: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What else the line has, for rewards: `tests` and `cases` for one"""

    @property
    def kind(self) -> str:
        """The line's `kind`, if it is text."""
        found = self.fields.get("kind")
        return found if isinstance(found, str) else ""


@dataclass(frozen=True)
class PromptSet:
    """Prompts as tokens."""

    prompts: tuple[RLPrompt, ...]
    tokens: tuple[tuple[int, ...], ...]
    """Of each, up to where the answer begins"""
    dropped: int
    """Prompts that were too long"""
    content_hash: str
    """Of all prompts, those dropped included, and the template"""

    @property
    def longest(self) -> int:
        """Tokens."""
        return max(map(len, self.tokens))


def read_prompts(file: Path) -> list[RLPrompt]:
    """Of an object a line, blank lines aside: `prompt` or `messages`, and as far as wished `id`,
    `reference` and whatever rewards look at.

    ValueError, one line, with file and line, for what is no UTF-8, no JSON, of a wrong type, for an
    id that comes twice, and for a file without prompts. OSError for one that cannot be read.
    """
    prompts, lines = [], {}
    for number, line in numbered_lines(file):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        try:
            prompts.append(_prompt(line, number, where))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        first = lines.setdefault(prompts[-1].id, number)
        if first != number:
            raise ValueError(f"{where}: id is {shown(prompts[-1].id)}, as of line {first}")
    if not prompts:
        raise ValueError(f"{file} holds no prompt; allowed: one or more")
    return prompts


def _prompt(line: str, number: int, where: str) -> RLPrompt:
    found = json_of(line)
    if not isinstance(found, dict):
        raise ValueError(f"{shown(found)}; allowed: an object with prompt or messages")
    turns = turns_of(found)
    return RLPrompt(
        id=id_of(found, number),
        where=where,
        prompt=turns[-1]["content"],
        messages=turns,
        reference=text_or_none(found, "reference"),
        fields={name: value for name, value in found.items() if name not in _OWN},
    )


def encode_prompts(prompts: Sequence[RLPrompt], template: ChatTemplate, room: int) -> PromptSet:
    """Those of at most `room` tokens.

    ValueError, one line, for messages that the template refuses, and if no prompt is left.
    """
    kept = []
    shortest = None
    for prompt in prompts:
        try:
            tokens = tuple(template.encode(prompt.messages))
        except ValueError as error:
            raise ValueError(f"{prompt.where}: {error}") from None
        if len(tokens) <= room:
            kept.append((prompt, tokens))
        shortest = len(tokens) if shortest is None else min(shortest, len(tokens))
    if not kept:
        raise ValueError(
            f"all {len(prompts)} prompts are too long, the shortest of {shortest} tokens; allowed: "
            f"at most {room}, which leaves room for an answer"
        )
    texts = [json.dumps(asdict(prompt) | {"where": ""}, sort_keys=True) for prompt in prompts]
    left, ids = zip(*kept, strict=True)
    dropped = len(prompts) - len(kept)
    return PromptSet(left, ids, dropped, hash_texts([template.source, *texts]))


def chosen(num_prompts: int, seed: int, batch: int, count: int) -> list[int]:
    """The `count` prompts of a batch: all once an epoch, each epoch in an order of its own."""
    found = []
    for number in range(batch * count, (batch + 1) * count):
        epoch, place = divmod(number, num_prompts)
        found.append(shuffled(place, num_prompts, key64("prompts", seed, epoch)))
    return found
