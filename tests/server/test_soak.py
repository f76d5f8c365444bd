"""Clients come, read, break off and go for a long time: every request ends, nothing stays."""

import asyncio
import gc
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.inference.engines import count_compilations
from tests.server.clients import ask, raw_request, until
from tests.server.models import model_and_service
from tests.server.serving import serving

CLIENTS = 32


@dataclass
class Outcome:
    """Of one client's request."""

    status: int
    whole: bool
    left: bool


async def client(base: str, rng: np.random.Generator) -> Outcome:
    """A stream, read to its end, or until its reader has had enough."""
    prompt = "".join(rng.choice(list("abcdefgh "), rng.integers(1, 30)))
    body = {
        "prompt": prompt,
        "max_tokens": int(rng.integers(1, 30)),
        "n": int(rng.integers(1, 3)),
        "stream": True,
        "temperature": float(rng.integers(0, 2)),
    }
    if rng.random() < 0.2:
        body |= {"echo": True, "logprobs": 1}
    leaves_after = int(rng.integers(1, 8)) if rng.random() < 0.3 else None
    host, _, port = base.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(raw_request("/v1/completions", json.dumps(body).encode(), "connection: close"))
        status = int((await reader.readline()).split(b" ")[1])
        events = done = 0
        async for line in reader:
            events += line.startswith(b"data: ")
            done += line.startswith(b"data: [DONE]")
            if leaves_after is not None and events >= leaves_after:
                return Outcome(status, bool(done), True)
        return Outcome(status, bool(done), False)
    finally:
        writer.close()


async def quarter(base: str, count: int, seed: int) -> list[Outcome]:
    """So many requests, at most `CLIENTS` at the same time, at random times."""
    rng, room = np.random.default_rng(seed), asyncio.Semaphore(CLIENTS)

    async def one(of: np.random.Generator) -> Outcome:
        async with room:
            await asyncio.sleep(float(of.exponential(0.02)))
            async with asyncio.timeout(300):
                return await client(base, of)

    return await asyncio.gather(*(one(of) for of in rng.spawn(count)))


def resident() -> int:
    """Bytes of this process that are in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize(
    "requests",
    [
        pytest.param(40, marks=pytest.mark.slow),
        pytest.param(500, marks=[pytest.mark.exhaustive, pytest.mark.timeout(3600)]),
    ],
)
def test_a_long_service_ends_every_request_and_keeps_nothing(requests):
    _, service = model_and_service(drafts=1, queue=2 * CLIENTS)
    service.thread.engine.warm_up()
    engine, memory, outcomes = service.thread.engine, [], []
    with serving(service, connections=CLIENTS + 8) as base:
        asyncio.run(
            quarter(base, 8, seed=99)
        )  # threads, buffers, code that is loaded when first used
        with count_compilations() as compiled:
            for seed in range(4):
                outcomes += asyncio.run(quarter(base, requests // 4, seed))
                until(lambda: not engine.pending)
                memory.append(resident())
        assert service.thread.open == 0
        assert ask(base, "/health").status == 200
    assert not compiled
    assert Counter(one.status for one in outcomes) == {200: requests}
    assert all(one.whole or one.left for one in outcomes)
    assert sum(one.left for one in outcomes) > requests // 10
    for pages in engine.scheduler.pages:
        pages.check()
        assert pages.free == pages.count
    assert memory[-1] < 1.02 * memory[0], memory
