"""Copies of rows in slots: the bookkeeping of whatever moves tokens, and gathers both ways.

Every row has up to J copies, each in a slot of its own or in none; slots may be empty. Letters in
this folder: R rows, J copies of each, S slots, N nodes, G targets, P devices. To fill the
slots and to sum up a row's copies are each other's transposes and gathers both: a scatter would
run on one core of XLA:CPU and be atomic on a GPU.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from dsv3_jax.quant.wide import wide


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["slot_RJ", "copy_S"],
    meta_fields=["complete"],
)
@dataclass(frozen=True)
class Copies:
    """int32: slot of every copy, S where it has none; copy (row * J + j) of every slot, R * J where
    it is empty. `complete` says that every copy has a slot.
    """

    slot_RJ: jax.Array
    copy_S: jax.Array
    complete: bool = False

    @property
    def rows_S(self) -> jax.Array:
        """Row of every slot; R where it is empty."""
        return self.copy_S // self.slot_RJ.shape[1]


def in_slots(slot_RJ: jax.Array, slots: int, *, complete: bool = False) -> Copies:
    """Copies whose slots are known: the other table."""
    copies = slot_RJ.size
    copy_S = jnp.full(slots, copies, jnp.int32)
    ids = jnp.arange(copies, dtype=jnp.int32)
    # Slots beyond the last are those of copies that have none.
    copy_S = copy_S.at[slot_RJ.reshape(-1)].set(ids, mode="drop", unique_indices=complete)
    return Copies(slot_RJ, copy_S, complete)


def fill_slots(x_RD: jax.Array, copies: Copies) -> jax.Array:
    """Each slot's row [S, ...], zeros in empty slots."""
    return x_RD.at[copies.rows_S].get(mode="fill", fill_value=0)


def sum_copies(y_SD: jax.Array, copies: Copies) -> jax.Array:
    """The sum of each row's copies [R, D], at least float32."""
    return sum(
        _of_slots(y_SD, slot_R, copies).astype(wide(y_SD.dtype)) for slot_R in copies.slot_RJ.T
    )


def fill_values(v_RJ: jax.Array, copies: Copies) -> jax.Array:
    """A number of each copy [R, J] in its slot [S], 0 in empty slots."""
    return v_RJ.reshape(-1).at[copies.copy_S].get(mode="fill", fill_value=0)


def values_of_copies(v_S: jax.Array, copies: Copies) -> jax.Array:
    """`fill_values` transposed: of every copy what is in its slot [R, J]; 0 if it has none."""
    return _of_slots(v_S, copies.slot_RJ, copies)


def _of_slots(y_SD: jax.Array, slot: jax.Array, copies: Copies) -> jax.Array:
    if copies.complete:
        return y_SD[slot]
    return y_SD.at[slot].get(mode="fill", fill_value=0)


def running_count(chosen_RG: jax.Array, chunk: int = 128) -> jax.Array:
    """Inclusive running sums of the columns of a bool matrix, int32.

    Two levels of triangular products: a cumsum over R is serial on XLA:CPU.
    """
    size, groups = chosen_RG.shape
    padded = jnp.pad(chosen_RG, ((0, -size % chunk), (0, 0))).reshape(-1, chunk, groups)
    # Counts within a chunk are at most 128: exact in float32.
    ones = padded.astype(jnp.float32)
    within = jnp.einsum("ij,cjg->cig", jnp.tri(chunk, dtype=jnp.float32), ones).astype(jnp.int32)
    total = within[:, -1]
    before = jnp.cumsum(total, 0) - total
    return (within + before[:, None]).reshape(-1, groups)[:size]
