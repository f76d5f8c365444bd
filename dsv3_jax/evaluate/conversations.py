"""Conversations as text that a harness can hold and add to, and back as ids.

lm-eval keeps what it asks as text, and joins answers to it. So the template's text must be all that
is needed for the ids: its marks become tokens, and what only looks like one, in a question, was
taken apart by characters that no text has (see `data.chat`).
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from dsv3_jax.data.answers import AnswerTemplate


class Conversations(AnswerTemplate):
    """A chat template between text and ids."""

    @property
    def fingerprint(self) -> str:
        """Of its source, 16 digits."""
        return hashlib.sha256(self.source.encode()).hexdigest()[:16]

    def text(self, messages: Sequence[Mapping[str, Any]], answer: bool = True) -> str:
        """To where the assistant begins to speak; without `answer` to where the last message, the
        beginning of the assistant's answer, goes on.

        ValueError, one line, for messages that the template refuses, or whose last one it changes.
        """
        text = self._rendered([self._apart(message) for message in messages], answer)
        if answer:
            return text
        begun = str(messages[-1]["content"])
        place = text.rfind(begun.strip())
        if place < 0:
            raise ValueError(f"{self.name} changes the assistant's own words: {begun[:40]!r}")
        kept = begun if text.startswith(begun, place) else begun.strip()
        return text[: place + len(kept)]

    def ids(self, text: str) -> list[int]:
        """Of such a text, and of what was added to it."""
        return [int(token) for part in self._encoded(text) for token in part]
