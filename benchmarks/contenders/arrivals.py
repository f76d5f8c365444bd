"""Requests of different lengths for the contests of serving, the same ones for every contender, and
how static batches serve them.

Imports nothing but the standard library: contenders run under interpreters of their own.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Arrival(NamedTuple):
    """A request: token ids, how many to add greedily, and seconds after the start."""

    prompt: list[int]
    tokens: int
    at: float


def arrivals(options: Mapping[str, Any]) -> list[Arrival]:
    """In the order of their coming.

    Of the options, `prompt` and `tokens` are the fewest and the most; `rate` is requests a second
    on average, which come at random, or 0 for all at once; prompts are pieces of `text`, token ids,
    or if that is empty random ids below `vocab_size`; `seed`, if it is there, makes other ones.
    """
    rng, at, found, text = random.Random(options.get("seed", 0)), 0.0, [], options["text"]
    for _ in range(options["requests"]):
        length, tokens = (rng.randint(*options[name]) for name in ("prompt", "tokens"))
        if text:
            start = rng.randrange(len(text) - length)
            prompt = text[start : start + length]
        else:
            prompt = [rng.randrange(options["vocab_size"]) for _ in range(length)]
        found.append(Arrival(prompt, tokens, at))
        if options["rate"]:
            at += rng.expovariate(options["rate"])
    return found


def served_in_batches(
    found: Sequence[Arrival], rows: int, serve: Callable[[Sequence[Arrival]], None]
) -> float:
    """Whoever waits is served together, at most so many at a time, and no other until all of them
    are. -> mean seconds from a request's coming to its end.
    """
    start, served, waited = time.perf_counter(), 0, []
    while served < len(found):
        now = time.perf_counter() - start
        batch = [arrival for arrival in found[served : served + rows] if arrival.at <= now]
        if not batch:
            time.sleep(found[served].at - now)
            continue
        serve(batch)
        end = time.perf_counter() - start
        waited += [end - arrival.at for arrival in batch]
        served += len(batch)
    return statistics.mean(waited)
