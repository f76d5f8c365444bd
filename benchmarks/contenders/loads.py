"""Loads on whoever serves, and what each request met: an open loop, whose requests come when they
come, and a closed one, whose clients ask again when they have their answer.

In the open loop a request's time counts from when it was due, whether or not it could be sent
then: a server that stalls makes all wait that come meanwhile, and a client that waited with it
would measure one of them (coordinated omission).

Imports nothing but the standard library: contenders run under interpreters of their own.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from arrivals import Arrival, arrivals
from http_client import Answer
from outcomes import Outcome

Ask = Callable[[Arrival], Awaitable[Answer]]


async def open_loop(found: Sequence[Arrival], ask: Ask) -> list[Outcome]:
    """Each at its time, however many are under way."""
    start = time.perf_counter()

    async def one(arrival: Arrival) -> Outcome:
        due = start + arrival.at
        await asyncio.sleep(due - time.perf_counter())
        return await _outcome(arrival, due, ask)

    return list(await asyncio.gather(*(one(arrival) for arrival in found)))


async def closed_loop(found: Sequence[Arrival], clients: int, ask: Ask) -> list[Outcome]:
    """So many at a time, the next one when one has ended; due when they are sent."""
    waiting, outcomes = iter(found), []

    async def client() -> None:
        for arrival in waiting:  # all clients take from one and the same iterator
            outcomes.append(await _outcome(arrival, time.perf_counter(), ask))

    await asyncio.gather(*(client() for _ in range(clients)))
    return outcomes


async def _outcome(arrival: Arrival, due: float, ask: Ask) -> Outcome:
    late = time.perf_counter() - due
    status, first, end, tokens, prompt = await ask(arrival)
    if status != 200:
        return Outcome(late, 0.0, 0.0, 0, 0, status)
    return Outcome(late, first - due, end - due, tokens, prompt, status)


class Turns:
    """Work of a contender: in each turn every load once, with other requests in every one."""

    def __init__(
        self,
        options: Mapping[str, Any],
        text: Sequence[Any],
        ask: Ask,
        server_cpu: Callable[[], float],
        peak_memory: Callable[[], int],
    ) -> None:
        """Prompts are pieces of `text`. `server_cpu` are seconds of processors, `peak_memory`
        bytes, of whoever serves.
        """
        self._options, self._text, self._ask, self._turn = options, text, ask, 0
        self._server_cpu, self._peak_memory = server_cpu, peak_memory

    def __call__(self) -> dict[str, Any]:
        """`seconds` are those of the loads alone; `peak_bytes` those of whoever serves."""
        self._turn += 1
        loads = [
            self._run(load, f"{self._options['seed']} {self._turn} {place}")
            for place, load in enumerate(self._options["loads"])
        ]
        seconds = sum(load["seconds"] for load in loads)
        return {"seconds": seconds, "loads": loads, "peak_bytes": self._peak_memory()}

    def warm_up(self) -> None:
        """As many requests at once as there are rows, the longest ones, and alone the shortest."""
        rows = self._options["rows"]
        for count, pick in ((rows, -1), (1, 0)):
            sizes = {name: [self._options[name][pick]] * 2 for name in ("prompt", "tokens")}
            load = {"clients": count}
            made = self._run(load, f"warm-up {self._turn} {count}", **sizes, requests=count)
            assert all(one.status == 200 for one in made["outcomes"]), made["outcomes"]

    def _run(self, load: Mapping[str, float], seed: str, **changes: Any) -> dict[str, Any]:
        work = self._options | {"rate": load.get("rate", 0), "seed": seed, "text": self._text}
        found = arrivals(work | changes)
        begun, own, theirs = time.perf_counter(), time.thread_time(), self._server_cpu()
        if "clients" in load:
            loop = closed_loop(found, load["clients"], self._ask)
        else:
            loop = open_loop(found, self._ask)
        outcomes = asyncio.run(loop)
        return {
            "seconds": time.perf_counter() - begun,
            "client_cpu": time.thread_time() - own,
            "server_cpu": self._server_cpu() - theirs,
            "outcomes": outcomes,
        }
