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
from dsv3_jax.quant.formats import format_of
from dsv3_jax.quant.fp8 import Blocked, divided
from dsv3_jax.quant.recipes import RECIPES, Operand
from dsv3_jax.quant.trained_weight import TrainedWeight
from dsv3_jax.train.loss import loss
from dsv3_jax.train.optimizer import parameter_name
from dsv3_jax.train.quantised import quantised, rule_of, with_blocks
from dsv3_jax.train.step import TrainState

KINDS = ("weight", "input", "gradient")
# XLA compiles this program for a few runs of it: without optimisation, in a third of the time.
OPTIONS = {"xla_backend_optimization_level": 0}


class Health(NamedTuple):
    """Of one tensor as it enters its GEMM; the fields are the columns of what `measure` returns."""

    underflow: float
    """Share of the numbers that are not 0, and are 0 after rounding"""
    saturation: float
    """Share of the finite numbers beyond the format's largest"""
    not_finite: float
    """Share of NaN and infinities"""
    smallest_scale: float
    largest_scale: float


Layers = dict[str, dict[str, Health]]  # parameter by layer -> kind -> health


def measure(x: jax.Array, operand: Operand) -> jax.Array:
    """x [..., D, F] -> `Health` as float32 [5]."""
    block, fmt = operand.block or x.shape[-2:], format_of(operand.fmt)
    parts, scales = divided(x, block, operand.fmt, operand.scale)
    size, finite = jnp.abs(parts), jnp.isfinite(parts)
    # What is no normal number of float32, XLA:CPU may take for 0.
    counts = size >= jnp.finfo(jnp.float32).tiny
    # The scale is rounded too: a block's own largest number may be above by a last bit.
    saturated = finite & (size > fmt.largest * (1 + 2.0**-20))
    underflowed = counts & (fmt.round(jnp.minimum(size, fmt.largest)) == 0)
    total = jnp.maximum(counts.sum() + (~finite & ~counts).sum(), 1)
    shares = [where.sum() / total for where in (underflowed, saturated, ~finite)]
    used = counts.any((-3, -1))  # a block of zeros has scale 1, which says nothing
    smallest = jnp.where(used, scales, jnp.inf).min()
    largest = jnp.where(used, scales, 0).max()
    return jnp.stack([*shares, smallest, largest]).astype(jnp.float32)


def make_probe(
    graphdef: nnx.GraphDef, cfg: RunConfig
) -> Callable[[TrainState, Rows], Layers] | None:
    """`probe(state, rows)`; None for a recipe that quantises nothing."""
    size, recipe = cfg.train.rows // cfg.train.microbatches, cfg.quant.recipe

    @partial(jax.jit, compiler_options=OPTIONS)
    def find(state: TrainState, batch: Batch) -> dict[str, jax.Array]:
        blocks = quantised(state.params, recipe)
        taps = {name: _no_taps(name, blocked) for name, blocked in blocks.items()}
        valid_tokens = jnp.maximum((batch.labels_BT >= 0).sum(), 1) * cfg.train.microbatches

        def total(taps):
            def watch(weight: TrainedWeight, name: str) -> TrainedWeight:
                return replace(weight, taps=taps[name], measure=measure)

            params = with_blocks(state.params, blocks, recipe, watch)
            model = nnx.merge(graphdef, params, state.biases)
            return loss(model, batch, valid_tokens, 1.0, cfg.train)[0]

        weights = _weights(state.params, recipe)
        tapped = jax.grad(total)(taps)
        return {name: jnp.stack([weights[name], *tapped[name]], -2) for name in blocks}

    def probe(state: TrainState, rows: Rows) -> Layers:
        batch = stack([rows[index % len(rows)] for index in range(size)])
        return _by_layer(jax.device_get(find(state, batch)), cfg.model.num_dense_layers)

    return probe if RECIPES[recipe] else None


def _is_stack(name: str) -> bool:
    return bool(layer_names(tuple(name.split(".")), (1,), 0))


def _no_taps(name: str, blocked: Blocked) -> tuple[jax.Array, jax.Array]:
    layers = blocked.shape[:1] if _is_stack(name) else ()
    return (jnp.zeros((*layers, len(Health._fields))),) * 2


def _weights(params: nnx.State, recipe: str) -> dict[str, jax.Array]:
    """`measure` of each weight that is quantised, for each layer of a stack."""
    found = {}
    for path, weight in jax.tree_util.tree_leaves_with_path(params):
        name = parameter_name(path)
        rule = rule_of(recipe, name)
        if rule:
            of_one = partial(measure, operand=rule.weight)
            found[name] = jax.vmap(of_one)(weight) if _is_stack(name) else of_one(weight)
    return found


def _by_layer(found: dict[str, np.ndarray], num_dense_layers: int) -> Layers:
    """Arrays [..., kind, field] by parameter -> values by layer."""
    layers = {}
    for name, array in found.items():
        names = layer_names(tuple(name.split(".")), array.shape, num_dense_layers)
        for layer, kinds in zip(names or [name], array if names else [array], strict=True):
            values = (Health(*row.tolist()) for row in kinds)
            layers[layer] = dict(zip(KINDS, values, strict=True))
    return layers


def not_finite(layers: Layers) -> str:
    """Which tensors hold NaN or infinities; empty if none does."""
    found = [
        f"{kind} of {name}"
        for name, kinds in layers.items()
        for kind, health in kinds.items()
        if health.not_finite
    ]
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
