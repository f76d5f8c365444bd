"""Serves requests of different lengths with dsv3_jax, greedily, once for every line read: by the
engine, or in static batches of `continued`.

Run by decode_cpu.py with an interpreter that has the project; the one argument is JSON.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from answering import answer
from arrivals import Arrival, arrivals, served_in_batches
from dsv3_model import model_of

from dsv3_jax.inference.engine import SHORTEST_CHUNK, Engine
from dsv3_jax.inference.generate import continued
from dsv3_jax.inference.requests import Request
from dsv3_jax.inference.sampling import sampling
from dsv3_jax.inference.settings import EngineConfig, buckets
from dsv3_jax.inference.weights import lay_out


def main() -> None:
    options = json.loads(sys.argv[1])
    found = arrivals(options)
    served = by_engine if options["engine"] else in_batches
    work = served(options, found)
    answer(work, warm_up=options["warm_up"], versions=f"jax {jax.__version__}")


# --- the engine ---


def by_engine(options: dict[str, Any], found: Sequence[Arrival]) -> Callable[[], dict[str, float]]:
    """Work that tells the mean wait of its requests. All that it needs is compiled before."""
    drafts = options["drafts"]
    # Prompts are read anew in every turn.
    settings = EngineConfig(rows=options["rows"], drafts=drafts, share_prefixes=False)
    engine = Engine(lay_out(model_of(options), drafts=drafts), settings)
    meet_all_sizes(engine, options["prompt"][1], options["prompt"][1] + options["tokens"][1])
    compiled = engine.programs.compiled

    def work() -> dict[str, float]:
        wait = served_by(engine, found)
        assert engine.programs.compiled == compiled, "compiled while it was timed"
        return {"wait": wait}

    return work


def served_by(engine: Engine, found: Sequence[Arrival]) -> float:
    """Mean seconds from a request's coming to its end."""
    start, came, waited = time.perf_counter(), 0, []
    at: dict[int, float] = {}
    made = 0
    while came < len(found) or engine.pending:
        while came < len(found) and found[came].at <= time.perf_counter() - start:
            request_id = engine.submit(Request(found[came].prompt, found[came].tokens))
            at[request_id] = found[came].at
            came += 1
        if not engine.pending:
            time.sleep(max(found[came].at - (time.perf_counter() - start), 0))
        for one in engine.turn():
            made += len(one.tokens)
            if one.ended:
                waited.append(time.perf_counter() - start - at[one.id])
    wanted = sum(arrival.tokens for arrival in found)
    assert made == wanted, f"{made} tokens instead of {wanted}"
    return statistics.mean(waited)


def meet_all_sizes(engine: Engine, prompt: int, text: int) -> None:
    """Has the engine compile what prompts of at most so many tokens and such texts may need."""
    chunk = engine.settings.chunk
    parts = buckets(chunk, min(SHORTEST_CHUNK, chunk))
    for length in {
        min(whole + part, prompt) for whole in range(0, prompt, chunk) for part in parts
    }:
        engine.submit(Request([0] * length, 1))
        list(engine.run())
    for rows in buckets(engine.settings.rows):
        for _ in range(rows):
            engine.submit(Request([0], text - 1))
        list(engine.run())


# --- static batches ---


def in_batches(options: dict[str, Any], found: Sequence[Arrival]) -> Callable[[], dict[str, float]]:
    """Work that tells the mean wait of its requests.

    `continued` takes rows of one length: prompts are filled up at their left to the longest, and
    batches with rows, since another number of them would be another program.
    """
    weights, rows, longest = lay_out(model_of(options)), options["rows"], options["prompt"][1]
    how = sampling(0)

    def serve(batch: Sequence[Arrival]) -> None:
        prompt_BT = np.zeros((rows, longest), np.int32)
        for row_T, arrival in zip(prompt_BT, batch, strict=False):
            row_T[longest - len(arrival.prompt) :] = arrival.prompt
        for _ in continued(weights, prompt_BT, max(one.tokens for one in batch), how):
            pass

    return lambda: {"wait": served_in_batches(found, rows, serve)}


if __name__ == "__main__":
    main()
