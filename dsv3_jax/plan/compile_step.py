"""The step of a run without a pipeline, compiled for all of its devices from shapes alone, and held
against the closed forms of `plan/memory.py`.

It is one program. Its state and its rows are arguments and results; weights as computed with, sums
of gradients and residuals are temporaries, whose sizes the compiler does not tell apart. So these
three are read where the step is traced, within the `shard_map` of one device: what it gathers and
quantises, what gradients are like, and the leaves of JAX's own transposed function, without those
that are weights or arguments. XLA:CPU's temporary memory has them in it.
"""

import math
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.config import RunConfig
from dsv3_jax.plan.compiled import CompiledPlan, CompiledRank
from dsv3_jax.plan.lowered import Say, compiled_with_time, device_bytes, program_of
from dsv3_jax.plan.memory import memory_of
from dsv3_jax.quant.wide import wide
from dsv3_jax.train.machine import peak_memory
from dsv3_jax.train.programs import StepPrograms
from dsv3_jax.train.sharding import ROWS, WHOLE, make_sharding
from dsv3_jax.train.step import UNOPTIMISED, abstract_state, prepared


class Sizes(NamedTuple):
    """Bytes of one device within a step."""

    weights: int
    """Masters gathered from other devices, and quantised blocks"""
    gradients: int
    """Of one sum"""
    residuals: int
    """Of a micro-batch"""


def compile_step(cfg: RunConfig, say: Say = lambda line: None) -> CompiledPlan:
    """Of the full batch. ValueError if devices are lacking."""
    start, plan = time.monotonic(), memory_of(cfg)
    graphdef, shapes = abstract_state(cfg)
    programs = StepPrograms(cfg, graphdef, shapes, make_sharding(cfg, shapes.params))
    (planned,) = plan.ranks
    (stages,) = planned.stages
    lowered = programs.step.lower(*programs.arguments(cfg.train.rows))
    say(f"step     {stages}")
    compiled = compiled_with_time(lowered, compiler_options=UNOPTIMISED)
    found = traced_sizes(programs)
    sums = 1 + (cfg.train.microbatches > 1)  # a micro-batch's own beside those of all before it
    rank = CompiledRank(
        planned,
        found.weights,
        device_bytes(programs.shapes),
        sums * found.gradients,
        found.residuals,
    )
    return CompiledPlan(
        plan,
        (program_of("step", stages, *compiled, say),),
        (rank,),
        {f"0: {stages}": (found.residuals, planned.residuals)},
        {f"0: {stages}": (0, 0)},
        time.monotonic() - start,
        peak_memory(),
    )


def traced_sizes(programs: StepPrograms) -> Sizes:
    """Of a run's step with all rows; nothing is computed."""
    cfg, sharding, found = programs.cfg, programs.sharding, []

    def on_one_device(state, batch, mtp_weight):
        ready = prepared(programs.graphdef, state, batch, mtp_weight, cfg, sharding)
        micro = jax.tree.map(lambda x: x[0], ready.micros)
        slot_B = jnp.zeros(len(micro.labels_BT), wide(jnp.dtype(cfg.train.dtype)))
        slot_B = sharding.differing(slot_B)
        _, pull, _ = jax.vjp(lambda *x: ready.loss(*x, micro), ready.params, slot_B, has_aux=True)
        given = jax.tree.leaves((ready.params, ready.blocks, state, batch, micro, slot_B))
        pairs = zip(jax.tree.leaves(ready.params), jax.tree.leaves(state.params), strict=True)
        gathered = [whole for whole, stored in pairs if whole.shape != stored.shape]
        sizes = Sizes(
            local_bytes([*gathered, *jax.tree.leaves(ready.blocks)]),
            local_bytes(jax.tree.leaves(ready.params)),
            local_bytes(_others(jax.tree.leaves(pull), given)),
        )
        found.append(sizes)
        return jnp.zeros(())

    state, batch, coefficients = programs.arguments(cfg.train.rows)
    specs = sharding.state_specs(state)
    traced = sharding.per_device(on_one_device, (specs, ROWS, WHOLE), WHOLE)
    jax.eval_shape(traced, state, batch, coefficients.mtp_weight)
    return found[-1]


def _others(leaves: Iterable[Any], given: Iterable[Any]) -> list[Any]:
    """Those that are none of the given ones, each once."""
    known = {id(x) for x in given}
    return list({id(x): x for x in leaves if id(x) not in known}.values())


def local_bytes(arrays: Iterable[jax.Array]) -> int:
    """Of arrays as one device has them."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
