"""Answers as JSON objects, in OpenAI's two forms: completions and chats, whole and in pieces."""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dsv3_jax.server.choices import Likely, Piece, TokenLog


@dataclass(frozen=True)
class Usage:
    """Tokens of one request; a prompt that has several answers counts once."""

    prompt: int
    written: int

    def form(self) -> dict[str, int]:
        """OpenAI's names."""
        total = self.prompt + self.written
        counts = {"prompt_tokens": self.prompt, "completion_tokens": self.written}
        return counts | {"total_tokens": total}


@dataclass
class Form(ABC):
    """What all objects of one answer have in common."""

    prefix: ClassVar[str]
    whole_name: ClassVar[str]
    piece_name: ClassVar[str]

    model: str
    has_logs: bool
    tells_usage: bool
    """Whether a stream ends with counts of tokens; its other objects have null there"""
    created: int = field(default_factory=lambda: int(time.time()))
    """Seconds since 1970"""
    digits: str = field(default_factory=lambda: secrets.token_hex(12))
    """Of the id that all of them have"""

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """All texts, each in one piece."""
        choices = [self.choice(place, piece) for place, piece in enumerate(pieces)]
        return self._object(self.whole_name, choices) | {"usage": usage.form()}

    def piece(self, place: int, piece: Piece, first: bool) -> dict[str, Any]:
        """More of one text; `first` of this text."""
        found = self._object(self.piece_name, [self.delta(place, piece, first)])
        return found | {"usage": None} if self.tells_usage else found

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The last object of a stream that tells it."""
        return self._object(self.piece_name, []) | {"usage": usage.form()}

    def _object(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": f"{self.prefix}-{self.digits}", "object": name, "created": self.created}
        return head | {"model": self.model, "choices": choices}

    @abstractmethod
    def choice(self, place: int, piece: Piece) -> dict[str, Any]:
        """A text in one piece."""

    @abstractmethod
    def delta(self, place: int, piece: Piece, first: bool) -> dict[str, Any]:
        """More of a text."""


class CompletionForm(Form):
    """Of `/v1/completions`."""

    prefix = "cmpl"
    whole_name = piece_name = "text_completion"

    def choice(self, place: int, piece: Piece) -> dict[str, Any]:
        logs = _columns(piece.logs) if self.has_logs else None
        found = {"index": place, "text": piece.text, "logprobs": logs}
        return found | {"finish_reason": piece.finish}

    def delta(self, place: int, piece: Piece, first: bool) -> dict[str, Any]:
        return self.choice(place, piece)


class ChatForm(Form):
    """Of `/v1/chat/completions`."""

    prefix = "chatcmpl"
    whole_name, piece_name = "chat.completion", "chat.completion.chunk"

    def choice(self, place: int, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": place, "message": message} | self._end(piece)

    def delta(self, place: int, piece: Piece, first: bool) -> dict[str, Any]:
        found = {"role": "assistant"} if first else {}
        return {"index": place, "delta": found | {"content": piece.text}} | self._end(piece)

    def _end(self, piece: Piece) -> dict[str, Any]:
        logs = [_entry(log) for log in piece.logs]
        told = {"content": logs, "refusal": None} if self.has_logs else None
        return {"logprobs": told, "finish_reason": piece.finish}


def _columns(logs: Sequence[TokenLog]) -> dict[str, list]:
    """As completions have them, a list for each column. Of two tokens that are spelt alike the
    likelier is told, and the token itself is always among the likeliest.
    """
    top = []
    for log in logs:
        if log.own.logprob is None:
            top.append(None)
            continue
        found: dict[str, float] = {}
        for one in (*log.top, log.own):
            found.setdefault(one.token, one.logprob)
        top.append(found)
    return {
        "tokens": [log.own.token for log in logs],
        "token_logprobs": [log.own.logprob for log in logs],
        "top_logprobs": top,
        "text_offset": [log.offset for log in logs],
    }


def _entry(log: TokenLog) -> dict[str, Any]:
    return _likely(log.own) | {"top_logprobs": [_likely(one) for one in log.top]}


def _likely(one: Likely) -> dict[str, Any]:
    """A mark has no bytes in the text, which OpenAI writes as null."""
    return {"token": one.token, "logprob": one.logprob, "bytes": list(one.data) or None}
