"""A text as its client gets it: in pieces of whole characters, up to a stop string, with
log-probabilities of its tokens if they are wished.
"""

import codecs
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.inference.requests import Answer, Scores
from dsv3_jax.inference.text import REPLACEMENT, TextStream

Finish = Literal["stop", "length"]
_LEAST = -9999.0  # JSON has no infinity, and clients know this number for it


class Likely(NamedTuple):
    """A token and the natural logarithm of its probability; None where nothing comes before it."""

    token: str
    data: bytes
    logprob: float | None


class TokenLog(NamedTuple):
    """A token of a text, the likeliest ones in its place, and where in the text it begins."""

    own: Likely
    top: list[Likely]
    offset: int


@dataclass
class Piece:
    """More of one text."""

    text: str = ""
    logs: list[TokenLog] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, more: "Piece") -> None:
        """What came after it."""
        self.text += more.text
        self.logs += more.logs
        self.finish = more.finish


class Choice:
    """One text on its way."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        *,
        stops: Sequence[str] = (),
        top: int | None = None,
        echo: bool = False,
        nothing_new: bool = False,
    ) -> None:
        """`top` likeliest tokens are told of with each, None: no logs; `nothing_new`: of the answer
        nothing is shown.
        """
        self._tokenizer, self._prompt = tokenizer, prompt
        self._stream = TextStream(tokenizer.token_bytes, stops)
        self._offsets = _Offsets()
        self._top, self._echo, self._nothing_new = top, echo, nothing_new
        self.written = 0
        """Tokens of the answer so far, without one that only ends it"""

    def add(self, answer: Answer) -> Piece:
        """What an answer brings. With `finish` set the client has all."""
        piece = self._prompt_piece(answer.prompt) if self._echo else Piece()
        self._echo = False
        if self._nothing_new:
            piece.finish = "length"
            return piece
        count = len(answer.tokens) - (answer.ended == "stop")
        for i in range(count):
            token = answer.tokens[i]
            piece.text += self._stream.add(token)
            self.written += 1
            if self._top is not None:
                piece.logs.append(self._log(token, answer.logprobs[i], answer.top[i]))
            if self._stream.stopped:
                break
        if answer.ended is not None:
            piece.text += self._stream.finish()
        if self._stream.stopped:
            piece.finish = "stop"
        else:
            piece.finish = answer.ended
        return piece

    def _prompt_piece(self, scores: Scores | None) -> Piece:
        piece = Piece(self._tokenizer.decode(self._prompt))
        if scores is not None:
            first, *others = self._prompt
            piece.logs.append(self._log(first, None, []))
            for token, logprob, top in zip(others, scores.logprobs, scores.top, strict=True):
                piece.logs.append(self._log(token, logprob, top))
            self._offsets.begin_at(len(piece.text))
        return piece

    def _log(self, token: int, logprob: float | None, top: Sequence[tuple[int, float]]) -> TokenLog:
        likely = [self._likely(*one) for one in top[: self._top]]
        own = self._likely(token, logprob)
        return TokenLog(own, likely, self._offsets.of(own.data))

    def _likely(self, token: int, logprob: float | None) -> Likely:
        table = self._tokenizer.token_bytes
        data = table[token] if token < len(table) else REPLACEMENT  # as texts have it
        # A mark of the vocabulary is shown as it is spelt, though it is no part of the text.
        shown = data.decode(errors="replace") or self._tokenizer.spelling_of(token) or f"<{token}>"
        return Likely(shown, data, None if logprob is None else _number(logprob))


class _Offsets:
    """Where tokens begin in their text, in characters: one whose first bytes end a character begins
    behind it.
    """

    def __init__(self) -> None:
        self.begin_at(0)

    def begin_at(self, place: int) -> None:
        self._place, self._decoder = place, codecs.getincrementaldecoder("utf-8")("replace")

    def of(self, data: bytes) -> int:
        begin = self._place
        self._place += len(self._decoder.decode(data))
        return begin


def _number(x: float) -> float:
    """In as many digits as float32 has."""
    return max(float(f"{x:.7g}"), _LEAST) if math.isfinite(x) else _LEAST
