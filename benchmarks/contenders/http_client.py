"""A client of OpenAI-compatible servers that costs little: streamed completions over HTTP/1.1, a
connection for each, with nothing but asyncio's streams.

Imports nothing but the standard library: contenders run under interpreters of their own.
"""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

PATIENCE = 600.0  # seconds of a request
MOST_HEADERS = 2**16  # bytes
_STATUS = re.compile(rb"http/1\.[01] (\d{3})")


class Answer(NamedTuple):
    """What came for one request. Times are those of `time.perf_counter`."""

    status: int
    """As of `Outcome`"""
    first: float = 0.0
    """When the first piece came"""
    end: float = 0.0
    tokens: int = 0
    """That were written, as the server counts them"""
    prompt: int = 0
    """Tokens of the prompt, counted there too"""


class Events:
    """Server-sent events out of bytes that come in any pieces."""

    def __init__(self) -> None:
        self._line, self._data = b"", []

    def fed(self, piece: bytes) -> list[bytes]:
        """Data of the events that are complete with this piece."""
        *lines, self._line = (self._line + piece).split(b"\n")
        found = []
        for line in lines:
            line = line.removesuffix(b"\r")
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
            elif not line and self._data:
                found.append(b"\n".join(self._data))
                self._data = []
        return found


async def ask(host: str, port: int, path: str, fields: dict[str, Any]) -> Answer:
    """Asks for a stream and reads it to its end."""
    try:
        async with asyncio.timeout(PATIENCE):
            reader, writer = await asyncio.open_connection(host, port, limit=MOST_HEADERS)
            try:
                writer.write(_request(host, port, path, json.dumps(fields).encode()))
                return await _answer(reader)
            finally:
                writer.close()
    # The last two are of a server that speaks something else.
    except (OSError, EOFError, asyncio.LimitOverrunError, ValueError):
        return Answer(0)


def _request(host: str, port: int, path: str, body: bytes) -> bytes:
    lines = (
        f"POST {path} HTTP/1.1",
        f"host: {host}:{port}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
        "",
        "",
    )
    return "\r\n".join(lines).encode() + body


async def _answer(reader: asyncio.StreamReader) -> Answer:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if not (found := _STATUS.match(head)):
        raise ValueError("no HTTP")
    if (status := int(found[1])) != 200:
        return Answer(status)
    events, first, usage = Events(), 0.0, None
    async for piece in _pieces(reader, b"\r\ntransfer-encoding: chunked\r\n" in head):
        for data in events.fed(piece):
            if data == b"[DONE]":
                continue
            said = json.loads(data)
            if "error" in said:
                return Answer(0)
            if said.get("choices"):
                first = first or time.perf_counter()
            usage = said.get("usage") or usage
    if usage is None:
        return Answer(0)
    end = time.perf_counter()
    return Answer(200, first, end, usage["completion_tokens"], usage["prompt_tokens"])


async def _pieces(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    """A body as it comes. EOFError or ValueError if it breaks off."""
    if chunked:
        while size := int((await reader.readline()).partition(b";")[0], 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
    else:
        while piece := await reader.read(2**16):
            yield piece
