"""Weights quantised once per step, before its first forward pass (report 3.3.2)."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
from flax import nnx

from dsv3_jax.model.precision import class_of
from dsv3_jax.parallel.mesh import parameter_name
from dsv3_jax.quant.fp8 import Blocked
from dsv3_jax.quant.recipes import Recipe, Rule
from dsv3_jax.quant.trained_weight import Taps, TrainedWeight


class Quantized(NamedTuple):
    """A parameter that a recipe quantises."""

    name: str
    master: jax.Array
    rule: Rule


def quantized(params: nnx.State, recipe: Recipe) -> Iterator[Quantized]:
    """Those that the recipe has a rule for."""
    for path, master in jax.tree_util.tree_leaves_with_path(params):
        name = parameter_name(path)
        rule = recipe.get(class_of(name))
        if rule:
            yield Quantized(name, master, rule)


def quantize_weights(params: nnx.State, recipe: Recipe) -> dict[str, Blocked]:
    """Each of them in its blocks, by its parameter's name."""
    return {name: rule.quantized(w) for name, w, rule in quantized(params, recipe)}


def attach(
    params: nnx.State,
    blocks: Mapping[str, Blocked],
    recipe: Recipe,
    taps: Mapping[str, Taps] = {},
) -> nnx.State:
    """Parameters whose linears multiply with these blocks, while gradients go to the parameters."""
    weights = {
        name: TrainedWeight(blocks[name], master, rule, taps.get(name))
        for name, master, rule in quantized(params, recipe)
    }
    return jax.tree_util.tree_map_with_path(
        lambda path, master: weights.get(parameter_name(path), master), params
    )


def with_quantized_weights(params: nnx.State, recipe: Recipe) -> nnx.State:
    """Parameters as a forward pass of this recipe takes them."""
    return attach(params, quantize_weights(params, recipe), recipe)
