"""A model's weights laid out for decoding.

Stacks come apart, since a scan over a stack copies each layer's weights out of it at every token.
The two halves of w_ukv are transposed once and not at every token. Of MTP modules so many are kept
as there are to be drafts.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.model.block import Block
from dsv3_jax.model.mtp import MTP
from dsv3_jax.model.transformer import DeepSeekV3


class Layer(NamedTuple):
    """One layer, its w_ukv as MLA's absorbed form takes it, and where its experts lie, if they lie
    elsewhere than the router's ids say.
    """

    block: Block
    w_uk_HNC: jax.Array
    w_uv_HCU: jax.Array
    placement: Any = None

    @property
    def expansion(self) -> tuple[jax.Array, jax.Array]:
        return self.w_uk_HNC, self.w_uv_HCU


class Depth(NamedTuple):
    """An MTP module: its layer, and the module without it."""

    layer: Layer
    rest: MTP


class Weights(NamedTuple):
    """Layers one by one, the model without layers (embedding, last norm, head), and the first MTP
    modules, those that make drafts.
    """

    layers: tuple[Layer, ...]
    rest: DeepSeekV3
    depths: tuple[Depth, ...] = ()


def lay_out(model: DeepSeekV3, *, consume: bool = False, drafts: int = 0) -> Weights:
    """The weights of the main model and of `drafts` MTP modules. Those of layers are copied, MTP's
    are not.

    `model` stays, or with `consume` gives up its layers: one variable's are held twice at a time.
    ValueError for more drafts than there are modules.
    """
    if not 0 <= drafts <= len(model.mtp):
        raise ValueError(
            f"{drafts} drafts a step; allowed: 0 to {len(model.mtp)}, the MTP modules of the model"
        )
    stacks = (model.dense_layers, model.moe_layers)
    blocks = [block for stack in stacks for block in _apart(stack, consume)]
    dtype = model.embed_VD.dtype
    rest = jax.tree.map(lambda x: x, model)
    rest.dense_layers = rest.moe_layers = None
    rest.mtp = nnx.List([])
    depths = tuple(_depth(module, dtype) for module in model.mtp[:drafts])
    return Weights(tuple(_layer(block, dtype) for block in blocks), rest, depths)


def check_alike(weights: Weights, known: Weights) -> None:
    """ValueError, one line, for weights that have not the shapes and dtypes of the known ones,
    which programs are compiled for.
    """
    found, wanted = (
        {
            jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}"
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (weights, known)
    )
    for name in {**wanted, **found}:
        one, other = found.get(name, "missing"), wanted.get(name, "none")
        if one != other:
            raise ValueError(f"weights{name}: {one}; allowed: {other}, as the engine began with")


def _layer(block: Block, dtype: jnp.dtype) -> Layer:
    return Layer(block, *block.mla.expansion(dtype))


def _depth(module: MTP, dtype: jnp.dtype) -> Depth:
    rest = jax.tree.map(lambda x: x, module)
    rest.block = None
    return Depth(_layer(module.block, dtype), rest)


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
