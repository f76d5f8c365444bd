"""A model's initial weights by few draws, which a compiler is done with sooner (report 4.2).

Those that `DeepSeekV3` begins with, to the bit where both are compiled alike: normal numbers of a
key are the first of a longer draw of it, whatever their shape. So parameters of like size are rows
of one loop, where a compiler takes nearly a tenth of a second for each draw by itself.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import Init
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.parallel.stages import Cut

# Numbers in a row of a loop. Larger parameters are drawn alone, each device its shards of them:
# every device of a mesh makes all rows of a loop, filled up to a power of two so that there are few
# loops, and cuts the parameters out of them. With four times as many a model of 47 M parameters
# took 477 MB on each of 8 devices for a moment; so it takes 69, and 29 without loops.
LONGEST = 1 << 18
SHORTEST = 1 << 14


class Paths(Init):
    """Writes down instead of drawing: in place of a parameter are the numbers that lead from the
    model's key to its own, uint32 [1 + DEEPEST], the first of them how many. One scan over those of
    all parameters is compiled sooner than a chain of `fold_in` for each.
    """

    DEEPEST = 6  # mtp, depth, block, moe, shared, w_gate_DF
    path: tuple[int | jax.Array, ...] = ()

    def deeper(self, number: int | jax.Array) -> "Paths":
        further = Paths(self.key, self.std, self.dtype)
        further.path = (*self.path, number)
        return further

    def normal(self, name: str, *shape: int) -> nnx.Param:
        path = self.at(name).path
        assert len(path) <= self.DEEPEST, path
        numbers = (len(path), *path, *[0] * (self.DEEPEST - len(path)))
        return nnx.Param(jnp.stack([jnp.asarray(n, jnp.uint32) for n in numbers]))


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

    def build(init_type: type[Init]) -> DeepSeekV3:
        return DeepSeekV3(cfg, rngs=nnx.Rngs(key), dtype=dtype, cut=cut, init_type=init_type)

    like = jax.tree.leaves(jax.eval_shape(lambda: build(Init)))
    values, tree = jax.tree.flatten(build(Paths))
    places = [i for i, value in enumerate(values) if value.dtype == jnp.uint32]
    init = Init(nnx.Rngs(key).params(), cfg.init_std, dtype)
    paths = [values[i].reshape(-1, 1 + Paths.DEEPEST) for i in places]
    ends = list(itertools.accumulate(map(len, paths), initial=0))
    stacks = [values[i].ndim - 1 for i in places]  # leading sizes: a key for each of them
    parameters = [
        _Parameter(range(start, end), like[i].shape[stack:], like[i].shape)
        for i, stack, (start, end) in zip(places, stacks, itertools.pairwise(ends), strict=True)
    ]
    drawn = _values(_keys(init.key, jnp.concatenate(paths)), parameters, init)
    for i, value in zip(places, drawn, strict=True):
        values[i] = value
    return jax.tree.unflatten(tree, values)


def _keys(root: jax.Array, path_RP: jax.Array) -> jax.Array:
    """What `Paths` has written down, followed from the model's key: keys [R]."""
    count_R, numbers_RQ = path_RP[:, 0], path_RP[:, 1:]

    def deeper(keys_R, step):
        place, number_R = step
        further_R = jax.vmap(jax.random.fold_in)(keys_R, number_R)
        return jnp.where(place < count_R, further_R, keys_R), None

    places = jnp.arange(numbers_RQ.shape[1], dtype=jnp.uint32)
    roots_R = jnp.broadcast_to(root, count_R.shape)
    return lax.scan(deeper, roots_R, (places, numbers_RQ.T))[0]


def _values(keys_R: jax.Array, parameters: list[_Parameter], init: Init) -> list[jax.Array]:
    """Of the parameters, in their order."""
    # Without it (JAX's older way of random numbers) a longer draw is another one from the start.
    longest = LONGEST if jax.config.jax_threefry_partitionable else 0
    values, loops = [None] * len(parameters), {}
    for i, (rows, row, shape) in enumerate(parameters):
        length = math.prod(row)
        if length > longest:
            draw = jax.vmap(lambda key, row=row: init.drawn(key, row))
            values[i] = draw(keys_R[rows.start : rows.stop]).reshape(shape)
        else:
            size = max(SHORTEST, 1 << (length - 1).bit_length())
            loops.setdefault(size, []).append(i)
    for size, members in loops.items():
        drawn = _in_a_loop(keys_R, [parameters[i] for i in members], size, init)
        for i, value in zip(members, drawn, strict=True):
            values[i] = value
    return values


def _in_a_loop(
    keys_R: jax.Array, parameters: list[_Parameter], size: int, init: Init
) -> Iterator[jax.Array]:
    """Values of parameters that have at most `size` numbers for each key."""
    chosen = np.concatenate([parameter.rows for parameter in parameters])
    draws_RN = lax.map(lambda key: init.drawn(key, (size,)), keys_R[chosen])
    start = 0
    for rows, row, shape in parameters:
        end = start + len(rows)
        yield draws_RN[start:end, : math.prod(row)].reshape(shape)
        start = end
