"""What low precision does to a run's tensors: shares of underflow and saturation, range of scales,
per kind of tensor and layer (report 3.3).

A program of its own looks at one micro-batch of held-out rows whenever a run validates, so training
steps pay nothing for it. It reads each linear's input, and the gradient of its output, through the
taps of `TrainedWeight`; weights it reads directly.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.checkpoint.names import layer_names
from dsv3_jax.config import RunConfig
from dsv3_jax.data.loader import Batch, stack
from dsv3_jax.data.packing import Rows
from dsv3_jax.parallel.mesh import is_stacked
from dsv3_jax.quant.formats import lost
from dsv3_jax.quant.fp8 import Blocked
from dsv3_jax.quant.recipes import Operand, Recipe, recipe_of
from dsv3_jax.quant.trained_weight import Taps
from dsv3_jax.train.loss import loss
from dsv3_jax.train.quantized_weights import attach, quantize_weights, quantized
from dsv3_jax.train.step import UNOPTIMISED, TrainState

KINDS = ("weight", "input", "gradient")


class Health(NamedTuple):
    """Of one tensor as it enters its GEMM; the fields are the columns of what `measure` returns."""

    underflow: float
    """Share of the numbers that are not 0, and are 0 after rounding"""
    saturation: float
    """Share of them that are finite and beyond the format's largest"""
    not_finite: float
    """Share of them that are NaN or infinities"""
    smallest_scale: float
    """Of blocks that are not all zero; NaN where all are"""
    largest_scale: float


HealthByLayer = dict[str, dict[str, Health]]  # parameter of a layer -> kind -> health


def measure(x_xMD: jax.Array, operand: Operand) -> jax.Array:
    """x [x, M, D], groups of rows as the operand rounds them -> `Health` as float32 [5]."""
    parts, scales = operand.divided(x_xMD)
    not_finite, counts = ~jnp.isfinite(parts), parts != 0
    losses = lost(parts, operand.fmt)
    total = jnp.maximum(counts.sum(), 1)
    counted = losses.underflowed, losses.saturated, not_finite.sum()
    used = (counts & ~not_finite).any((-3, -1))  # a block of zeros has scale 1: it says nothing
    smallest, largest = jnp.where(used, scales, jnp.inf).min(), jnp.where(used, scales, 0).max()
    smallest, largest = (jnp.where(used.any(), scale, jnp.nan) for scale in (smallest, largest))
    return jnp.stack([*(count / total for count in counted), smallest, largest]).astype(jnp.float32)


def make_probe(
    graphdef: nnx.GraphDef, cfg: RunConfig
) -> Callable[[TrainState, Rows, float], HealthByLayer] | None:
    """`probe(state, rows, mtp_weight)`; None for a recipe that quantises nothing."""
    size, recipe = cfg.train.rows // cfg.train.microbatches, recipe_of(cfg.quant)

    @partial(jax.jit, compiler_options=UNOPTIMISED)
    def measure_all(state: TrainState, batch: Batch, mtp_weight: jax.Array) -> dict[str, jax.Array]:
        blocks = quantize_weights(state.params, recipe)
        valid_tokens = jnp.maximum((batch.labels_BT >= 0).sum(), 1) * cfg.train.microbatches

        def total(taps):
            model = nnx.merge(graphdef, attach(state.params, blocks, recipe, taps), state.biases)
            row_share = 1 / cfg.train.microbatches
            return loss(model, batch, valid_tokens, mtp_weight, cfg.train, row_share)[0]

        taps = {name: _zero_taps(name, blocked) for name, blocked in blocks.items()}
        tapped, weights = jax.grad(total)(taps), _weights(state.params, recipe)
        return {
            name: jnp.stack([weights[name], tap.input, tap.grad_output], -2)
            for name, tap in tapped.items()
        }

    def probe(state: TrainState, rows: Rows, mtp_weight: float) -> HealthByLayer:
        batch = stack([rows[index % len(rows)] for index in range(size)])
        found = measure_all(state, batch, jnp.float32(mtp_weight))
        return _by_layer(jax.device_get(found), cfg.model.num_dense_layers)

    return probe if recipe else None


def _zero_taps(name: str, blocked: Blocked) -> Taps:
    zeros = jnp.zeros((*blocked.shape[: is_stacked(name)], len(Health._fields)))
    return Taps(zeros, zeros, measure)


def _weights(params: nnx.State, recipe: Recipe) -> dict[str, jax.Array]:
    """`measure` of each weight that is quantised, for each layer of a stack."""
    found = {}
    for name, master, rule in quantized(params, recipe):
        # One scale for a matrix is one for each expert's.
        operand = replace(rule.weight, block=rule.weight.block or master.shape[-2:])
        of_one = partial(measure, operand=operand)
        found[name] = jax.vmap(of_one)(master) if is_stacked(name) else of_one(master)
    return found


def _by_layer(found: dict[str, np.ndarray], num_dense_layers: int) -> HealthByLayer:
    """Arrays [..., kind, field] by parameter -> values by layer."""
    layers = {}
    for name, array in found.items():
        names = layer_names(tuple(name.split(".")), array.shape, num_dense_layers)
        for layer, kinds in zip(names or [name], array if names else [array], strict=True):
            values = (Health(*row.tolist()) for row in kinds)
            layers[layer] = dict(zip(KINDS, values, strict=True))
    return layers


def not_finite(layers: HealthByLayer) -> str:
    """Which tensors hold NaN or infinities; empty if none does."""
    found = [
        f"{kind} of {name}"
        for name, kinds in layers.items()
        for kind, health in kinds.items()
        if health.not_finite
    ]
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
