"""Texts of any length in windows, and what is told of them: perplexity, bits per byte (report 4.4).

The first window holds as many tokens as the model takes. Each further one scores the next `stride`
tokens and reads, before them, as many of those scored already as still fit: every token is scored
once, and from the second window on with at least `longest` - `stride` tokens before it. A small
stride reads a text `longest` / `stride` times; `longest` itself reads it once, but leaves the first
tokens of each window with little before them.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dsv3_jax.config.plain_json import check_plain


class Window(NamedTuple):
    """Tokens from `begin` to `end` are read, and the last `scored` behind them are scored."""

    begin: int
    end: int
    scored: int


class TextScore(NamedTuple):
    """Of a text whose tokens cost `nats` together, and which has so many bytes in UTF-8."""

    nats: float
    tokens: int
    bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Of a token; infinite where no float holds it."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """No choice of tokenizer can flatter it."""
        return self.nats / math.log(2) / self.bytes

    def __add__(self, other: "TextScore") -> "TextScore":
        return TextScore(*(a + b for a, b in zip(self, other, strict=True)))


def windows(tokens: int, longest: int, stride: int) -> Iterator[Window]:
    """Over a text of so many tokens and one that begins it, place 0.

    `longest`: most tokens that are read. ValueError for a stride that is not within 1 and that.
    """
    if not 1 <= stride <= longest:
        raise ValueError(f"stride is {stride}; allowed: 1 to model.max_length = {longest}")
    done = min(tokens, longest)
    if done:
        yield Window(0, done, done)
    while done < tokens:
        scored = min(stride, tokens - done)
        done += scored
        yield Window(done - longest, done, scored)


def read_text(file: Path) -> str:
    """ValueError, one line, for a file that is empty or no UTF-8; OSError if it is no plain
    file, or cannot be read.
    """
    check_plain(file)
    data = file.read_bytes()
    if not data:
        raise ValueError(f"{file} is empty; allowed: text of one byte or more")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: byte {data[error.start]:#04x} at offset {error.start} is not UTF-8"
        ) from None
