"""Rows that devices share: who has which tokens, and how the row is put together again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import MeshConfig
from dsv3_jax.parallel.mesh import TOKEN_AXES, make_mesh, varying
from dsv3_jax.parallel.sequence import RowPlaces, RowShards, make_row_shards

MESHES = {"local": MeshConfig(1, 2, 1, 4), "node_local": MeshConfig(1, 2, 2, 2)}


def shards_of(sequence: str) -> RowShards:
    return RowShards(("local",) if sequence == "local" else ("node", "local"), 4)


def on_devices(sequence: str, body, *args):
    """Of each device what `body` returns: [8, ...]."""
    mesh = make_mesh(MESHES[sequence])
    program = jax.shard_map(
        lambda *args: varying(body(*args), TOKEN_AXES)[None],
        mesh=mesh,
        in_specs=P(),
        out_specs=P(TOKEN_AXES),
    )
    return np.asarray(jax.jit(program)(*args))


def test_rows_are_shared_where_asked_for():
    assert make_row_shards(MeshConfig(data=2, local=4)) is None
    assert make_row_shards(MeshConfig(local=1, node=4, sequence="local")) is None
    cfg = MeshConfig(data=2, node=4, local=8, sequence="local")
    assert make_row_shards(cfg) == RowShards(("local",), 8)
    assert (cfg.token_shards, cfg.row_shards, cfg.row_groups) == (64, 8, 8)
    cfg = MeshConfig(data=2, node=4, local=8, sequence="node_local")
    assert make_row_shards(cfg) == RowShards(("node", "local"), 32)
    assert (cfg.row_shards, cfg.row_groups) == (32, 2)


@pytest.mark.parametrize("sequence", MESHES)
def test_each_device_has_an_early_and_a_late_chunk(sequence: str):
    places = on_devices(sequence, lambda: shards_of(sequence).places(4))
    # Four devices, eight chunks of two tokens; the second group of devices has other rows.
    expected = [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]] * 2
    assert places.tolist() == expected


@pytest.mark.parametrize("sequence", MESHES)
def test_a_row_is_put_together_from_its_parts(sequence: str):
    x_BTD = jnp.arange(2 * 16 * 3.0).reshape(2, 16, 3)
    shards = shards_of(sequence)
    found = on_devices(sequence, lambda x: shards.whole(shards.own(x)), x_BTD)
    for device in range(8):
        np.testing.assert_array_equal(found[device], x_BTD)


def test_blocks_of_a_row_are_found_among_gathered_parts():
    """Blocks of one token: two to each chunk."""
    shards, x_BT = shards_of("local"), jnp.arange(16)[None]
    gathered = on_devices("local", lambda x: shards.gathered(shards.own(x)), x_BT)[0, 0]
    found = [gathered[int(shards.place_in_gathered(jnp.int32(j), 2))] for j in range(16)]
    assert found == list(range(16))


@pytest.mark.parametrize("blocks", [1, 3])
def test_all_devices_have_equally_many_blocks_of_scores(blocks: int):
    """Each chunk in `blocks` blocks: of queries by keys before them."""
    places = on_devices("local", lambda: shards_of("local").places(2 * blocks))
    assert len({(1 + own).sum() for own in places}) == 1


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_places_on_the_host_are_those_on_devices(shards: int):
    x_BT = np.arange(8 * 16).reshape(8, 16)
    places = RowPlaces(8, shards)
    parts = []
    for device in range(8):
        rows = places.rows_of(device, 8)
        assert list(rows) == list(range(8))[rows.start : rows.stop]
        parts.append(places.part(x_BT[rows], device))
    assert np.concatenate(parts).shape == (8 * shards, 16 // shards)
    assert sorted(np.concatenate(parts, None)) == list(range(8 * 16))
    if shards == 4:
        expected = on_devices("local", lambda x: shards_of("local").own(x), jnp.asarray(x_BT))
        for device in range(8):
            np.testing.assert_array_equal(
                parts[device], expected[device][places.rows_of(device, 8)]
            )
    assert places.own_rows([0], 8) == list(range(shards))
    assert places.own_rows([0, 7], 8) == [*range(shards), *range(8 - shards, 8)]
