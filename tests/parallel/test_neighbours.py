"""What crosses between ranks of a pipeline arrives where it should, bit for bit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import MeshConfig
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.neighbours import Crossings, rank_meshes
from tests.shapes import normal

DTYPES = ("bfloat16", "float32", "int32", "float8_e4m3fn", "bool")


@pytest.fixture(scope="module", params=["4x1x1x2", "2x2x2x1"])
def crossings(request) -> Crossings:
    pipe, data, node, local = map(int, request.param.split("x"))
    return Crossings(rank_meshes(make_mesh(MeshConfig(pipe, data, node, local))))


def any_bits(seed: int, devices: int, dtype: str, *shape: int) -> np.ndarray:
    """Every number is to be moved: -0, infinities, numbers below the normal ones. One NaN stands
    for all, since XLA:CPU moves bfloat16 as float32, where all become this one.
    """
    dtype = jnp.dtype(dtype)
    draw = np.random.default_rng(seed)
    if dtype == jnp.dtype(bool):
        return draw.integers(0, 2, (devices * 3, *shape)).astype(bool)
    raw = draw.integers(0, 256, (devices * 3, *shape, dtype.itemsize), np.uint8)
    x = raw.view(dtype)[..., 0]
    if x.dtype.kind == "i":
        return x
    with np.errstate(invalid="ignore"):  # of NaNs that signal
        return np.where(np.isnan(x), np.array(np.nan, dtype), x)


def placed(crossings: Crossings, rank: int, x: np.ndarray) -> jax.Array:
    return jax.device_put(x, crossings.places[rank])


def like(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def arrived(crossings: Crossings, rank: int, found: jax.Array, expected: np.ndarray) -> None:
    """Each device of the rank has its own part, and no other device anything."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.sharding == crossings.places[rank]
    assert {shard.device for shard in found.addressable_shards} == set(
        crossings.meshes[rank].devices.flat
    )
    np.testing.assert_array_equal(np.asarray(found).view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_neighbours_swap_bit_for_bit(crossings: Crossings, dtype: str):
    """Either way alone, and both at once; of the first pair and the last."""
    devices = crossings.meshes[0].size
    for left in sorted({0, len(crossings.meshes) - 2}):
        right, back = (any_bits(left + i, devices, dtype, 5) for i in (0, 100))
        struct = like(right)
        for ways in ((True, True), (True, False), (False, True)):
            given = (
                placed(crossings, left, right) if ways[0] else None,
                placed(crossings, left + 1, back) if ways[1] else None,
            )
            likes = tuple(struct if way else None for way in ways)
            got_left, got_right = crossings.swap(left, *given, likes)
            assert (got_right is not None, got_left is not None) == ways
            if ways[0]:
                arrived(crossings, left + 1, got_right, right)
            if ways[1]:
                arrived(crossings, left, got_left, back)


def test_any_rank_sends_a_tree_to_any_other(crossings: Crossings):
    devices, ranks = crossings.meshes[0].size, len(crossings.meshes)
    for source, target in ((0, ranks - 1), (ranks - 1, 0), (1, 0)):
        tree = {dtype: any_bits(i, devices, dtype, 2, 7) for i, dtype in enumerate(DTYPES)}
        given = {dtype: placed(crossings, source, x) for dtype, x in tree.items()}
        found = crossings.send(source, target, given, jax.tree.map(like, tree))
        assert set(found) == set(tree)
        for dtype, x in tree.items():
            arrived(crossings, target, found[dtype], x)


def test_every_rank_gets_the_sum_of_all(crossings: Crossings):
    """Of whole numbers, whose sums are exact; each device sums with its like on other ranks."""
    devices, ranks = crossings.meshes[0].size, len(crossings.meshes)
    for dtype in ("int32", "float32", "bfloat16"):
        draw = np.random.default_rng(0)
        parts = draw.integers(-8, 8, (ranks, devices * 3, 5)).astype(dtype)
        given = {r: {"a": placed(crossings, r, parts[r])} for r in range(ranks)}
        found = crossings.summed(given, {"a": like(parts[0])})
        expected = parts.astype(np.int32).sum(0).astype(dtype)
        for rank in range(ranks):
            arrived(crossings, rank, found[rank]["a"], expected)


def test_a_rank_without_a_share_adds_nothing(crossings: Crossings):
    devices = crossings.meshes[0].size
    share = np.asarray(normal(0, devices, 3))
    found = crossings.summed({1: placed(crossings, 1, share)}, like(share))
    for rank in range(len(crossings.meshes)):
        arrived(crossings, rank, found[rank], share)


def test_a_given_array_is_not_consumed(crossings: Crossings):
    """Weights are lent, and used on the rank that lends them too."""
    share = np.asarray(normal(0, crossings.meshes[0].size, 3))
    given = placed(crossings, 0, share)
    crossings.send(0, 1, given, like(share))
    crossings.swap(0, given, None, (like(share), None))
    np.testing.assert_array_equal(given, share)


def test_ranks_are_the_rows_of_the_mesh():
    mesh = make_mesh(MeshConfig(2, 1, 2, 2))
    first, second = rank_meshes(mesh)
    assert first.axis_names == second.axis_names == ("data", "node", "local")
    assert first.devices.shape == (1, 2, 2)
    assert [d.id for m in (first, second) for d in m.devices.flat] == [
        d.id for d in mesh.devices.flat
    ]
    assert Crossings((first, second)).places[1].spec == P(("data", "node", "local"))
