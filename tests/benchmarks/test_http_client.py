"""What a client hears of servers, of those that break off among them."""

import asyncio
import time
from pathlib import Path

import pytest

from tests.benchmarks.openai_servers import HEAD, chunk, complete, events, port_of, serving

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a script that lies in that folder, and for a contender."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "contenders")


def asked(answering, **fields):
    """The client's answer by a server that answers so, and when that began."""
    from http_client import ask

    async def both():
        async with await serving(answering) as server:
            return await ask("127.0.0.1", port_of(server), "/v1/completions", fields)

    begun = time.perf_counter()
    return asyncio.run(both()), begun


def test_events_are_the_same_in_whatever_pieces_they_come():
    from http_client import Events

    stream = (
        b": hello\r\nid: 1\ndata: a\xc3\xa4\r\n\r\ndata:b\ndata:  c\n\n\nretry: 5\n\ndata: d\n\n"
    )
    expected = [b"a\xc3\xa4", b"b\n c", b"d"]
    for size in (1, 2, 3, 7, len(stream)):
        found = Events()
        pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
        assert [one for piece in pieces for one in found.fed(piece)] == expected
    for cut in range(len(stream)):
        found = Events()
        assert found.fed(stream[:cut]) + found.fed(stream[cut:]) == expected


@pytest.mark.parametrize("size", [1, 5, 10_000])
def test_a_stream_is_counted_whole_in_whatever_chunks_it_comes(size: int):
    async def answering(fields, writer):
        data = events(fields["max_tokens"], 2)
        writer.write(HEAD)
        for i in range(0, len(data), size):
            writer.write(chunk(data[i : i + size]))
        writer.write(b"0\r\n\r\n")

    answer, begun = asked(answering, prompt="ab", max_tokens=4)
    assert (answer.status, answer.tokens, answer.prompt) == (200, 4, 2)
    assert begun < answer.first <= answer.end <= time.perf_counter()


def test_the_first_piece_is_heard_when_it_comes_and_not_when_all_have():
    async def answering(fields, writer):
        first, rest = events(2, 2).split(b"\n\n", 1)
        await asyncio.sleep(0.05)
        writer.write(HEAD + chunk(first + b"\n\n"))
        await asyncio.sleep(0.15)
        writer.write(chunk(rest) + b"0\r\n\r\n")

    answer, begun = asked(answering)
    assert answer.first - begun >= 0.05
    assert answer.end - answer.first >= 0.1


def test_a_stream_without_chunks_ends_with_its_connection():
    async def answering(fields, writer):
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + events(3, 2))

    assert asked(answering)[0][::3] == (200, 3)


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 2\r\n\r\n{}", 429),
        (b"HTTP/1.1 500 Internal Server Error\r\n\r\n", 500),
        (HEAD + chunk(events(3, 2)[:90]), 0),  # breaks off between chunks
        (HEAD + b"ff\r\n" + events(3, 2)[:90], 0),  # and within one
        (HEAD + chunk(events(3, 2).partition(b"\n\n")[0] + b"\n\n") + b"0\r\n\r\n", 0),
        (HEAD + chunk(b'data: {"error": {"message": "failed"}}\n\n' + events(3, 2)), 0),
        (HEAD + b"no chunk at all\r\n", 0),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", 0),
        (b"x" * 2**18, 0),
        (b"", 0),
    ],
)
def test_what_is_no_whole_text_is_an_error(said: bytes, status: int):
    async def answering(fields, writer):
        writer.write(said)

    assert asked(answering)[0] == (status, 0.0, 0.0, 0, 0)


def test_nobody_at_the_port_is_an_error():
    from http_client import ask

    async def both():
        async with await serving(complete) as server:
            port = port_of(server)
        return await ask("127.0.0.1", port, "/", {})

    assert asyncio.run(both()).status == 0
