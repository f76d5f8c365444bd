"""Rows in blocks of one expert each, and weights side by side: what all products have in common."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def by_group(x_XD: jax.Array, expert_x: jax.Array | None) -> jax.Array:
    """[x, M, D]: M rows of each expert's block; one block of all rows without experts."""
    groups = 1 if expert_x is None else expert_x.size
    return x_XD.reshape(groups, -1, x_XD.shape[-1])


def sum_by_expert(dw_xDF: jax.Array, expert_x: jax.Array, num_experts: int) -> jax.Array:
    """Each expert's blocks summed, [E, D, F], by a product with a one-hot matrix.

    It costs E / rows of the products that made dw (12 % at 16 experts), less than a scatter-add,
    which XLA:CPU runs on one core.
    """
    onehot_xE = jax.nn.one_hot(expert_x, num_experts, dtype=dw_xDF.dtype)
    return jnp.einsum("xe,xdf->edf", onehot_xE, dw_xDF, precision=lax.Precision.HIGHEST)


def blocks_of_experts(
    expert_x: jax.Array, num_experts: int, blocks: int
) -> tuple[jax.Array, jax.Array]:
    """First block of each expert, and how many it has of so many blocks in all, int32 [E]. expert_x
    names the experts of equal parts of them, in ascending order.
    """
    count_E = jnp.bincount(expert_x, length=num_experts) * (blocks // expert_x.size)
    first_E = jnp.cumsum(count_E) - count_E
    return first_E.astype(jnp.int32), count_E.astype(jnp.int32)


def side_by_side(parts: Sequence[jax.Array]) -> jax.Array:
    """Joined along the last dimension."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, -1)


def parted(
    joined: jax.Array, widths: Sequence[int], dtypes: Sequence[jnp.dtype]
) -> tuple[jax.Array, ...]:
    """`side_by_side` undone, each part in its own dtype."""
    parts = jnp.split(joined, np.cumsum(widths)[:-1], axis=-1)
    return tuple(part.astype(dtype) for part, dtype in zip(parts, dtypes, strict=True))


def only_live(x_XD: jax.Array, live_X: jax.Array) -> jax.Array:
    """Other rows as zeros. Chosen, not multiplied: NaN in a dead row is nobody's NaN."""
    return jnp.where(live_X[:, None], x_XD, 0)
