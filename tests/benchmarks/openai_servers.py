"""A server that speaks like OpenAI's, tells lies on demand, and computes nothing; as a program it
serves until it is killed.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable

Answering = Callable[[dict, asyncio.StreamWriter], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def events(tokens: int, prompt: int) -> bytes:
    """A text of so many pieces, its usage and its end."""
    pieces = [{"choices": [{"text": "x"}], "usage": None}] * tokens
    usage = {"choices": [], "usage": {"completion_tokens": tokens, "prompt_tokens": prompt}}
    said = b"".join(b"data: %s\n\n" % json.dumps(one).encode() for one in (*pieces, usage))
    return said + b"data: [DONE]\n\n"


async def complete(fields: dict, writer: asyncio.StreamWriter) -> None:
    """As many tokens as are asked for; of the prompt each character is one."""
    data = events(fields["max_tokens"], len(fields["prompt"]))
    writer.write(HEAD + chunk(data) + b"0\r\n\r\n")


async def serving(answering: Answering) -> asyncio.Server:
    """On a free port of this machine, in the loop that runs."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length: ")[2].split()[0])
        await answering(json.loads(await reader.readexactly(size)), writer)
        writer.close()

    return await asyncio.start_server(connected, "127.0.0.1", 0)


def port_of(server: asyncio.Server) -> int:
    return server.sockets[0].getsockname()[1]


async def main() -> None:
    server = await serving(complete)
    print(f"serving nothing at http://127.0.0.1:{port_of(server)}", file=sys.stderr, flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
