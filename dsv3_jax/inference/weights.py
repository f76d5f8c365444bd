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


def lay_out(model: DeepSeekV3, *, consume: bool = False) -> Weights:
    """The main model's weights, layer by layer. Those of layers are copied.

    `model` stays, or with `consume` gives up its layers: one variable's are held twice at a time.
    """
    stacks = (model.dense_layers, model.moe_layers)
    blocks = [block for stack in stacks for block in _apart(stack, consume)]
    dtype = model.embed_VD.dtype
    layers = tuple(Layer(block, *block.mla.expansion(dtype)) for block in blocks)
    rest = jax.tree.map(lambda x: x, model)
    rest.dense_layers = rest.moe_layers = None
    rest.mtp = nnx.List([])
    return Weights(layers, rest)


def _apart(stack: Block | None, consume: bool) -> list[Block]:
    """The layers of a stack; its memory is given back variable by variable if it is consumed."""
    variables, structure = jax.tree.flatten(stack)
    parts = []
    for x in variables:
        parts.append([x[i] for i in range(len(x))])
        if consume:
            jax.block_until_ready(parts[-1])  # or several variables' copies could be under way
            x.delete()
    return [structure.unflatten(layer) for layer in zip(*parts, strict=True)]
