"""A request's body: its bytes within their limit, and what is made of them."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from dsv3_jax.server.errors import Refusal
from dsv3_jax.server.protocol import Kind, parse

Made = TypeVar("Made")
# Bytes; of more a tokenizer makes ids in a thread, while the loop answers others.
_LONG = 20_000


async def read(request: Request, most: int, kind: type[Kind], make: Callable[[Kind], Made]) -> Made:
    """What `make` makes of a request's body of at most `most` bytes. Refusal for one that is
    longer, no JSON by its own words, or not of this kind, and as of `make`.
    """
    body = await _body_of(request, most)

    return await beside_if_long(len(body), lambda: make(parse(kind, body)))


async def beside_if_long(size: int, work: Callable[[], Made]) -> Made:
    """What `work` makes of so many bytes. While it takes long, others are answered."""
    return await asyncio.to_thread(work) if size > _LONG else work()


async def _body_of(request: Request, most: int) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, "the body's content-type; allowed: application/json")
    too_long = Refusal(413, f"the body is too long; allowed: {most} bytes")
    stated = request.headers.get("content-length", "0")
    if not stated.isdecimal() or int(stated[:20]) > most:
        raise too_long
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > most:
                raise too_long
    except ClientDisconnect:  # nobody hears of it
        raise Refusal(400, "the body ends before its end") from None
    return bytes(body)
