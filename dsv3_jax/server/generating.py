"""The two endpoints that write texts: whole, or in pieces as they come (server-sent events)."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dsv3_jax.server.bodies import beside_if_long, read
from dsv3_jax.server.choices import Piece
from dsv3_jax.server.engine_thread import EngineThread, Texts
from dsv3_jax.server.errors import Refusal
from dsv3_jax.server.forms import Usage
from dsv3_jax.server.jobs import Job
from dsv3_jax.server.metrics import Metrics
from dsv3_jax.server.protocol import ChatRequest, CompletionRequest

_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
_LOG_BYTES = 100  # that a token with its likeliest is worth, in the time it takes
_DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Limits:
    """Of one request."""

    body: int
    """Bytes"""
    seconds: float
    """From when it was read to its end, queue and all"""


class Generating:
    """An endpoint."""

    def __init__(
        self,
        kind: type[CompletionRequest] | type[ChatRequest],
        job_of: Callable[[Any], Job],
        thread: EngineThread,
        metrics: Metrics,
        limits: Limits,
    ) -> None:
        self._kind, self._job_of = kind, job_of
        self._thread, self._metrics, self._limits = thread, metrics, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        job = await read(request, self._limits.body, self._kind, self._job)
        async with self._thread.ask(job.requests) as texts:
            writing = _Writing(self._thread, self._metrics, texts, job)
            if job.streams:
                answer = self._stream(writing, send)
            else:
                answer = self._whole(writing, scope, receive, send)
            await _unless_gone(receive, answer)

    def _job(self, asked: Any) -> Job:
        self._thread.check_room(asked.texts)  # before its prompts are tokenised
        return self._job_of(asked)

    async def _whole(self, writing: "_Writing", scope: Scope, receive: Receive, send: Send) -> None:
        pieces = [Piece() for _ in writing.job.choices]
        try:
            async with asyncio.timeout(self._limits.seconds):
                async for place, piece, _ in writing.pieces():
                    pieces[place].add(piece)
        except TimeoutError:
            raise self._late() from None
        found = writing.job.form.whole(pieces, writing.usage)
        await Response(_json(found), media_type="application/json")(scope, receive, send)

    async def _stream(self, writing: "_Writing", send: Send) -> None:
        """Its status is sent before its first token comes, so what fails later is a piece too."""
        form = writing.job.form
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM})
        try:
            async with asyncio.timeout(self._limits.seconds):
                async for place, piece, first in writing.pieces():
                    if first or piece.text or piece.logs or piece.finish:
                        await _event(send, _json(form.piece(place, piece, first)))
                if form.tells_usage:
                    await _event(send, _json(form.usage(writing.usage)))
        except TimeoutError:
            await _event(send, self._late().body())
        except Refusal as refusal:
            await _event(send, refusal.body())
        await send({"type": "http.response.body", "body": _DONE, "more_body": False})

    def _late(self) -> Refusal:
        return Refusal(
            504, f"the answer took too long; allowed: {self._limits.seconds:g} s", code="timeout"
        )


class _Writing:
    """The texts of one request as they come; times are noted."""

    def __init__(self, thread: EngineThread, metrics: Metrics, texts: Texts, job: Job) -> None:
        self._thread, self._metrics, self._texts, self.job = thread, metrics, texts, job
        self._begun = time.monotonic()

    @property
    def usage(self) -> Usage:
        """So far."""
        return Usage(self.job.prompt_tokens, sum(choice.written for choice in self.job.choices))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece, bool]]:
        """Which text, more of it, and whether that is the first of it; until all have ended."""
        first_at: dict[int, float] = {}
        async for place, answer in self._thread.answers(self._texts):
            choice, is_first = self.job.choices[place], place not in first_at
            if is_first:
                first_at[place] = time.monotonic()
                self._metrics.first_token.observe(first_at[place] - self._begun)
            self._metrics.pace.note(len(answer.tokens))
            size = 0 if answer.prompt is None else _LOG_BYTES * len(answer.prompt.logprobs)
            piece = await beside_if_long(size, partial(choice.add, answer))
            if piece.finish is not None:
                if answer.ended is None:
                    self._thread.leave(self._texts, place)
                if choice.written > 1:
                    seconds = time.monotonic() - first_at[place]
                    self._metrics.per_token.observe(seconds / (choice.written - 1))
            yield place, piece, is_first
        self._metrics.whole.observe(time.monotonic() - self._begun)


async def _unless_gone(receive: Receive, answer: Coroutine[Any, Any, None]) -> None:
    """Ends an answer whose client has gone."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            answering.result()
    finally:
        for task in (answering, leaving):
            task.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)


async def _event(send: Send, data: bytes) -> None:
    await send(
        {"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True}
    )


def _json(found: Any) -> bytes:
    """In ASCII, in one line."""
    return json.dumps(found, separators=(",", ":"), allow_nan=False).encode()
