"""How requests come to whoever serves, and what is counted of them."""

import asyncio
import math
import statistics
import time
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks.openai_servers import complete, port_of, serving

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a script that lies in that folder, and for a contender."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "contenders")


def arriving(*times: float):
    from arrivals import Arrival

    return [Arrival(["a", "b"], 3, at) for at in times]


def test_gaps_between_requests_are_exponential_and_a_seed_makes_them():
    from arrivals import arrivals

    work = {"requests": 4000, "rate": 5.0, "prompt": (1, 2), "tokens": (1, 2), "text": "abcdef"}
    found = arrivals(work | {"seed": "0 1 2"})
    assert found == arrivals(work | {"seed": "0 1 2"})
    assert found != arrivals(work | {"seed": "0 1 3"})
    gaps = np.diff([one.at for one in found])
    # Of 4000 draws the mean has a sigma of 1.6 %, and a share of e^-k one of at most 0.008.
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.06)
    for k in (0.25, 1, 2):
        assert np.mean(gaps > k / 5) == pytest.approx(math.exp(-k), abs=0.03)


def test_an_open_loop_sends_when_it_is_time_whoever_is_still_served():
    from loads import open_loop

    sent, under_way, most = [], 0, 0
    begun = time.perf_counter()

    async def ask(arrival):
        nonlocal under_way, most
        sent.append((arrival.at, time.perf_counter() - begun))
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.2)
        under_way -= 1
        return 200, time.perf_counter(), time.perf_counter(), 3, 2

    times = (0.0, 0.01, 0.03, 0.1)
    outcomes = asyncio.run(open_loop(arriving(*times), ask))
    assert [at for at, _ in sent] == list(times)
    assert all(at <= came for at, came in sent)
    assert most == len(times)
    assert all(one.whole >= 0.2 for one in outcomes)


def test_a_closed_loop_has_so_many_under_way_and_asks_each_once():
    from loads import closed_loop

    under_way, seen, names = 0, [], []

    async def ask(arrival):
        nonlocal under_way
        under_way += 1
        seen.append(under_way)
        names.append(arrival.at)
        await asyncio.sleep(0.002 * (len(names) % 3))
        under_way -= 1
        return 200, time.perf_counter(), time.perf_counter(), 3, 2

    found = arriving(*range(20))
    assert len(asyncio.run(closed_loop(found, 3, ask))) == 20
    assert names == list(range(20))
    assert max(seen) == 3
    assert set(seen[3:-3]) == {3}


async def _first_stalls(seconds: float):
    """A server that takes one at a time, and long for the first."""
    line, stalls = asyncio.Lock(), [seconds]

    async def answering(fields, writer):
        async with line:
            if stalls:
                await asyncio.sleep(stalls.pop())
            await complete(fields, writer)

    return await serving(answering)


def test_a_server_that_stalls_shows_in_the_times_of_all_that_came_meanwhile():
    """No coordinated omission: the same stall is one slow request of a client that waits for it."""
    from http_client import ask
    from loads import closed_loop, open_loop

    stall, times = 0.4, [0.02 * i for i in range(10)]

    async def met(loop, *more):
        async with await _first_stalls(stall) as server:

            def one(arrival):
                fields = {"prompt": "".join(arrival.prompt), "max_tokens": arrival.tokens}
                return ask("127.0.0.1", port_of(server), "/", fields)

            return await loop(arriving(*times), *more, one)

    opened = asyncio.run(met(open_loop))
    assert {one.status for one in opened} == {200}
    for at, one in zip(times, opened, strict=True):
        assert one.whole >= stall - at - 0.01
        assert one.first >= stall - at - 0.01
    closed = sorted(one.whole for one in asyncio.run(met(closed_loop, 1)))
    assert closed[-1] >= stall
    assert statistics.median(closed) < stall / 4


def test_what_the_load_generator_itself_is_late_counts_too():
    from loads import open_loop

    async def ask(arrival):
        time.sleep(0.1)  # nobody else is sent meanwhile
        return 200, time.perf_counter(), time.perf_counter(), 3, 2

    first, second = asyncio.run(open_loop(arriving(0.0, 0.0), ask))
    assert first.late < 0.1
    assert second.late >= 0.1
    assert second.whole >= 0.2


def test_every_turn_has_other_requests_and_everyone_the_same_ones():
    from loads import Turns

    options = {
        "requests": 4,
        "prompt": [1, 5],
        "tokens": [1, 9],
        "seed": 0,
        "rows": 3,
        "loads": [{"rate": 1000.0}, {"clients": 2}],
    }

    def turns_of(contender: str, wrong: int = 0):
        heard = []

        async def ask(arrival):
            heard.append(arrival)
            status = 500 if len(heard) == wrong else 200
            return status, time.perf_counter(), time.perf_counter(), arrival.tokens, 1

        return Turns(options, list(range(99)), ask, lambda: 0.0, lambda: 7), heard

    (one, heard), (other, others) = turns_of("one"), turns_of("other")
    told = [one(), one()]
    other.warm_up()
    assert [(len(a.prompt), a.tokens) for a in others] == [(5, 9)] * 3 + [(1, 1)]
    others.clear()
    other(), other()
    assert heard == others
    assert len({tuple(a.prompt) for a in heard}) > 12
    assert all(turn["peak_bytes"] == 7 for turn in told)
    assert [len(load["outcomes"]) for load in told[0]["loads"]] == [4, 4]
    assert all(a.at == 0 for a in heard[4:8])
    assert [a.at for a in heard[:4]] == sorted(a.at for a in heard[:4])
    failing, _ = turns_of("failing", wrong=2)
    with pytest.raises(AssertionError):
        failing.warm_up()
