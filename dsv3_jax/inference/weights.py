"""A model's weights laid out for decoding.

Stacks come apart, since a scan over a stack copies each layer's weights out of it at every token.
The two halves of w_ukv are transposed once and not at every token. MTP modules are left out.
"""

from typing import NamedTuple

import jax
from flax import nnx

from dsv3_jax.model.block import Block
from dsv3_jax.model.transformer import DeepSeekV3


class Layer(NamedTuple):
    """One layer, and its w_ukv as MLA's absorbed form takes it."""

    block: Block
    w_uk_HNC: jax.Array
    w_uv_HCU: jax.Array


class Weights(NamedTuple):
    """Layers one by one, and the model without layers: embedding, last norm, head."""

    layers: tuple[Layer, ...]
    rest: DeepSeekV3


def lay_out(model: DeepSeekV3) -> Weights:
    """The main model's weights, layer by layer. Those of layers are copied; `model` stays."""
    layers = []
    for stack in (model.dense_layers, model.moe_layers):
        for i in range(0 if stack is None else stack.attention_norm_D.shape[0]):
            block = jax.tree.map(lambda x, i=i: x[i], stack)
            layers.append(Layer(block, *block.mla.expansion(model.embed_VD.dtype)))
    rest = jax.tree.map(lambda x: x, model)
    rest.dense_layers = rest.moe_layers = None
    rest.mtp = nnx.List([])
    return Weights(tuple(layers), rest)
