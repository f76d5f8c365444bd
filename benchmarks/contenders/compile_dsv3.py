"""Compiles dsv3_jax's programs once and prints their seconds, a line of JSON.

Run by compile_time.py; the one argument is JSON.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.config.presets import PRESETS, tiny_run
from dsv3_jax.config.run import RunConfig
from dsv3_jax.data.loader import Batch
from dsv3_jax.inference.generate import continued
from dsv3_jax.inference.sampling import sampling
from dsv3_jax.inference.statistics import Statistics
from dsv3_jax.inference.weights import lay_out
from dsv3_jax.train.step import Coefficients, abstract_state, init_state, make_step

LOWER = "/jax/core/compile/jaxpr_to_mlir_module_duration"
COMPILE = "/jax/core/compile/backend_compile_duration"

Seconds = dict[str, float]


def main() -> None:
    options = json.loads(sys.argv[1])
    cfg = tiny_run()
    if options["preset"] != "tiny":
        cfg = replace(
            cfg,
            model=PRESETS[options["preset"]](),
            train=replace(cfg.train, dtype="float32", remat="none"),
            data=replace(cfg.data, length=512),
        )
    events: Seconds = {}

    def heard(event: str, seconds: float, **_) -> None:
        events[event] = events.get(event, 0.0) + seconds

    jax.monitoring.register_event_duration_secs_listener(heard)
    with measured(events) as initial:
        state = jax.block_until_ready(init_state(cfg))
    graphdef, _ = abstract_state(cfg)
    if options["program"] == "train":
        parts = {"initial state": initial, "step": train_step(cfg, graphdef, state, events)}
    else:
        parts = decode(nnx.merge(graphdef, state.params, state.biases), events)
    print(json.dumps(parts))


@contextlib.contextmanager
def measured(events: Seconds) -> Iterator[Seconds]:
    """Seconds of the block by part; `trace` is the rest."""
    seconds: Seconds = {}
    events.clear()
    begun = time.perf_counter()
    yield seconds
    seconds |= parts_of(time.perf_counter() - begun, events)


def parts_of(total: float, events: Seconds) -> Seconds:
    lower, compiled = events.get(LOWER, 0.0), events.get(COMPILE, 0.0)
    trace = total - lower - compiled
    return {"trace": trace, "lower": lower, "compile": compiled, "total": total}


def train_step(cfg: RunConfig, graphdef, state, events: Seconds) -> Seconds:
    tokens = jax.ShapeDtypeStruct((cfg.train.rows, cfg.data.length), jnp.int32)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    with measured(events) as seconds:
        step = make_step(graphdef, cfg)
        step.lower(state, Batch(tokens, tokens), Coefficients(*[scalar] * 4)).compile()
    return seconds


def decode(model, events: Seconds) -> dict[str, Seconds]:
    """Of the program that reads the prompt, and of the one that goes on."""
    weights, statistics = lay_out(model), Statistics()
    prompt_BT = np.ones((1, 128), np.int32)
    made = continued(weights, prompt_BT, 4, sampling(0), statistics)
    parts, before = {}, 0.0
    for name in ("prefill", "decoding"):
        events.clear()
        next(made)
        parts[name] = parts_of(statistics.compiling - before, events)
        before = statistics.compiling
    return parts


if __name__ == "__main__":
    main()
