"""Weights quantised once per step, before its first forward pass (report 3.3.2)."""

from collections.abc import Callable

import jax
from flax import nnx

from dsv3_jax.model.precision import class_of
from dsv3_jax.quant.fp8 import Blocked
from dsv3_jax.quant.recipes import RECIPES, Rule
from dsv3_jax.quant.trained_weight import TrainedWeight
from dsv3_jax.train.optimizer import parameter_name

Blocks = dict[str, Blocked]


def rule_of(recipe: str, name: str) -> Rule | None:
    """By which a parameter enters its GEMMs; None for products in the activations' dtype."""
    return RECIPES[recipe].get(class_of(name))


def quantised(params: nnx.State, recipe: str) -> Blocks:
    """Each weight that the recipe has a rule for, by its parameter's name."""
    blocks = {}
    for path, weight in jax.tree_util.tree_leaves_with_path(params):
        name = parameter_name(path)
        rule = rule_of(recipe, name)
        if rule:
            blocks[name] = rule.weight.quantize(weight)
    return blocks


def with_blocks(
    params: nnx.State,
    blocks: Blocks,
    recipe: str,
    watch: Callable[[TrainedWeight, str], TrainedWeight] = lambda weight, name: weight,
) -> nnx.State:
    """Parameters whose linears multiply with their blocks, while gradients go to the parameters.

    `watch` may add taps to a weight of this name.
    """

    def weight(path: tuple, master: jax.Array) -> jax.Array | TrainedWeight:
        name = parameter_name(path)
        if name not in blocks:
            return master
        return watch(TrainedWeight(blocks[name], master, rule_of(recipe, name)), name)

    return jax.tree_util.tree_map_with_path(weight, params)


def for_products(params: nnx.State, recipe: str) -> nnx.State:
    """Parameters as a forward pass of this recipe takes them."""
    return with_blocks(params, quantised(params, recipe), recipe)
