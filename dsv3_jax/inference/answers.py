"""Whole texts out of an engine: many prompts to the end, told in the order in which they stand."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.prompt_file import Prompt
from dsv3_jax.inference.requests import Answer, Request
from dsv3_jax.inference.text import TextStream

Ask = tuple[Prompt, Request]


@dataclass
class Written:
    """A text that has ended. The token that said so is not in it."""

    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    """Of each token, at temperature 1; those of a stop string are among them"""
    ended: Literal["end", "stop", "max_tokens", "max_length"] = "end"


def tokens_of(engine: Engine, request: Request) -> Iterator[int]:
    """Tokens of one text as they come. ValueError for one that cannot be served."""
    engine.submit(request)
    return (token for answer in engine.run() for token in answer.tokens)


def texts_of(
    engine: Engine,
    asks: Sequence[Ask],
    token_bytes: Sequence[bytes],
    told: Callable[[int], None] = lambda ended: None,
) -> Iterator[Written | ValueError]:
    """The texts of all prompts, in their order; the ValueError of one that cannot be served.

    `told` hears after each turn how many have ended. No more are with the engine than it has rows
    for: while one waits it makes but one step a call.
    """
    room = engine.settings.rows * engine.programs.shards
    going: dict[int, tuple[int, _Text]] = {}
    ready: dict[int, Written | ValueError] = {}
    asked = due = 0
    while due < len(asks):
        while asked < len(asks) and engine.pending < room:
            prompt, request = asks[asked]
            try:
                going[_submit(engine, prompt, request)] = asked, _Text(prompt, token_bytes)
            except ValueError as error:
                ready[asked] = error
            asked += 1
        for answer in engine.turn():
            number, text = going[answer.id]
            if text.add(answer):
                engine.cancel(answer.id)  # it goes on unless it knows the end itself
                ready[number] = text.written
                del going[answer.id]
        told(due + len(ready))
        while due in ready:
            yield ready.pop(due)
            due += 1


def _submit(engine: Engine, prompt: Prompt, request: Request) -> int:
    if not prompt.text:
        raise ValueError("the prompt is empty; allowed: one character or more")
    return engine.submit(request)


class _Text:
    """A text on its way."""

    def __init__(self, prompt: Prompt, token_bytes: Sequence[bytes]) -> None:
        self._most, self.written = prompt.wishes.max_tokens, Written()
        self._stream = TextStream(token_bytes, prompt.wishes.stop)

    def add(self, answer: Answer) -> bool:
        """Whether the text has ended."""
        written, stream = self.written, self._stream
        count = len(answer.tokens) - (answer.ended == "stop")
        for token, logprob in zip(answer.tokens[:count], answer.logprobs[:count], strict=True):
            written.text += stream.add(token)
            written.logprobs.append(logprob)
            if stream.stopped:
                break
        if answer.ended is not None:
            written.text += stream.finish()
        if stream.stopped:
            written.ended = "stop"
        elif answer.ended == "length":
            asked_for = len(written.logprobs) == self._most
            written.ended = "max_tokens" if asked_for else "max_length"
        return stream.stopped or answer.ended is not None


def line_of(number: int, ask: Ask, text: Written | ValueError, logprobs: bool) -> str:
    """A line of JSON, in ASCII: no terminal lacks a character of it, and none is steered by it."""
    prompt, request = ask
    record = {"index": number, **prompt.carried}
    if isinstance(text, ValueError):
        return _json(record | {"error": str(text)})
    record |= {
        "text": text.text,
        "prompt_tokens": len(request.prompt),
        "tokens": len(text.logprobs),
        "ended": text.ended,
    }
    if logprobs:
        record["logprob"] = _number(math.fsum(text.logprobs))
        record["logprobs"] = [_number(logprob) for logprob in text.logprobs]
    return _json(record)


def _number(x: float) -> float | None:
    """In as many digits as float32 has; JSON has no infinity."""
    return float(f"{x:.7g}") if math.isfinite(x) else None


def _json(record: dict) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
