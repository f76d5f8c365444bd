"""A model's initial weights by few draws, which a compiler is done with sooner (report 4.2).

Value for value those that `DeepSeekV3` begins with: normal numbers of a key are the first of a
longer draw of it, whatever their shape. So parameters of like size are rows of one loop, where a
compiler takes a tenth of a second for each draw by itself.
"""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import Init, Paths
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.parallel.stages import Cut

# Numbers in a row of a loop. Larger parameters are drawn alone, each device its shards of them:
# every device makes all rows of a loop, and for a moment they are there twice. Rows are filled up
# to a power of two, so that there are few loops.
LONGEST = 1 << 20
SHORTEST = 1 << 14
# Optimised code would be done 0.8 s sooner for `tiny`, but takes that longer to compile.
RUNS_ONCE = {"xla_backend_optimization_level": 0}


class _Parameter(NamedTuple):
    """One to be drawn."""

    rows: range
    """Of the keys: one for each layer of its stack, or a single one"""
    row: tuple[int, ...]
    """Shape of what a key gives"""
    shape: tuple[int, ...]


def fresh(
    cfg: ModelConfig,
    key: jax.Array,
    dtype: jnp.dtype = jnp.float32,
    cut: Cut | None = None,
) -> DeepSeekV3:
    """`DeepSeekV3(cfg, rngs=nnx.Rngs(key), dtype=dtype, cut=cut)`; to be traced within a jit."""

    def build(init: type[Init]) -> DeepSeekV3:
        return DeepSeekV3(cfg, rngs=nnx.Rngs(key), dtype=dtype, cut=cut, init=init)

    like = jax.tree.leaves(jax.eval_shape(lambda: build(Init)))
    values, tree = jax.tree.flatten(build(Paths))
    places = [i for i, value in enumerate(values) if value.dtype == jnp.uint32]
    init = Init(nnx.Rngs(key).params(), cfg.init_std, dtype)
    paths = [values[i].reshape(-1, 1 + Paths.DEEPEST) for i in places]
    ends = list(itertools.accumulate(map(len, paths), initial=0))
    parameters = [
        _Parameter(range(start, end), like[i].shape[values[i].ndim - 1 :], like[i].shape)
        for i, start, end in zip(places, ends, ends[1:], strict=False)
    ]
    drawn = _drawn(_keys(init.key, jnp.concatenate(paths)), parameters, init)
    for i, value in zip(places, drawn, strict=True):
        values[i] = value
    return jax.tree.unflatten(tree, values)


def _keys(root: jax.Array, path_RP: jax.Array) -> jax.Array:
    """What `Paths` has written down, followed from the model's key: keys [R]."""
    count_R, numbers_RP = path_RP[:, 0], path_RP[:, 1:]

    def deeper(keys_R, step):
        place, number_R = step
        further_R = jax.vmap(jax.random.fold_in)(keys_R, number_R)
        return jnp.where(place < count_R, further_R, keys_R), None

    places = jnp.arange(numbers_RP.shape[1], dtype=jnp.uint32)
    roots_R = jnp.broadcast_to(root, count_R.shape)
    return lax.scan(deeper, roots_R, (places, numbers_RP.T))[0]


def _drawn(keys_R: jax.Array, parameters: list[_Parameter], init: Init) -> list[jax.Array]:
    """Their values, in the same order."""
    values, loops = [None] * len(parameters), {}
    for i, (rows, row, shape) in enumerate(parameters):
        length = math.prod(row)
        if length > LONGEST:
            draw = jax.vmap(lambda key, row=row: init.drawn(key, row))
            values[i] = draw(keys_R[rows.start : rows.stop]).reshape(shape)
        else:
            size = max(SHORTEST, 1 << (length - 1).bit_length())
            loops.setdefault(size, []).append(i)
    for size, members in loops.items():
        rows = np.concatenate([parameters[i].rows for i in members])
        draws_RN = lax.map(lambda key, size=size: init.drawn(key, (size,)), keys_R[rows])
        start = 0
        for i in members:
            rows, row, shape = parameters[i]
            draw_SN = draws_RN[start : start + len(rows), : math.prod(row)]
            values[i], start = draw_SN.reshape(shape), start + len(rows)
    return values
