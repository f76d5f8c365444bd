"""The programs by which pages leave a device's pools and come into them, as they are stored."""

from typing import Any, NamedTuple

import jax

from dsv3_jax.inference.cache import Pool
from dsv3_jax.inference.step import Rows, State


class Places(NamedTuple):
    """N pages and the row of one text of every device: int32 [B, N] and [B], of B devices.

    Pages and rows beyond the last ones are nobody's: read at random, and not written.
    """

    page_BN: Any
    row_B: Any


class Contents(NamedTuple):
    """What is in them: every array of the pools as stored [B, N, Z, ...], and the rows [B, ...]."""

    pools: tuple[Pool, ...]
    rows: Rows


def read_pages(state: State, places: Places) -> tuple[State, Contents]:
    """The state as it is, and what it has there."""

    def get(where: jax.Array, of: Any) -> Any:
        return jax.tree.map(lambda x: x.at[where].get(mode="clip"), of)

    return state, Contents(get(places.page_BN, state.pools), get(places.row_B, state.rows))


def write_pages(state: State, places: Places, contents: Contents) -> State:
    """The state with it."""

    def put(where: jax.Array, into: Any, new: Any) -> Any:
        return jax.tree.map(lambda x, one: x.at[where].set(one, mode="drop"), into, new)

    return state._replace(
        pools=put(places.page_BN, state.pools, contents.pools),
        rows=put(places.row_B, state.rows, contents.rows),
    )
