"""Masters in shards: which dimension, over which axes, and what a shard is that several hold."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import MeshConfig
from dsv3_jax.parallel.mesh import TOKEN_AXES, make_mesh, varying
from dsv3_jax.parallel.zero import gathered, holds_first, stored_spec, summed_and_scattered

SIZES = {"pipe": 1, "data": 2, "node": 2, "local": 2}
ALL = ("data", "node", "local")
CASES = {
    "all axes, largest dimension": ("w_DF", (8, 16), P(None, ALL)),
    "two axes": ("w_DF", (6, 4), P(None, ("data", "node"))),
    "one axis": ("w_DF", (6, 3), P("data", None)),
    "none": ("w_DF", (5, 3), P(None, None)),
    "layers stay together": ("moe_layers.w_DF", (8, 3, 16), P(None, None, ALL)),
    "gains": ("norm_D", (16,), P(None)),
    "gains of layers": ("moe_layers.norm_D", (8, 16), P(None, None)),
    "experts": ("moe.w_gate_EDF", (4, 6, 3), P(("node", "local"), "data", None)),
    "experts, odd": ("moe.w_gate_EDF", (4, 5, 3), P(("node", "local"), None, None)),
}


@pytest.mark.parametrize(("name", "shape", "spec"), CASES.values(), ids=CASES)
def test_the_largest_dimension_that_divides_is_spread(name: str, shape: tuple, spec: P):
    assert stored_spec(name, shape, SIZES) == spec


def test_axes_of_one_device_are_no_axes_to_spread_over():
    sizes = {"pipe": 1, "data": 1, "node": 1, "local": 4}
    assert stored_spec("w_DF", (12, 5), sizes) == P("local", None)
    assert stored_spec("moe.w_gate_EDF", (4, 6, 3), sizes) == P(("node", "local"), None, None)


@pytest.mark.parametrize(("name", "shape", "spec"), CASES.values(), ids=CASES)
def test_gradients_are_summed_and_weights_come_back_whole(name: str, shape: tuple, spec: P):
    """Device p contributes p + 1 times the weight; every shard counts once in a sum over all."""
    mesh = make_mesh(MeshConfig(data=2, node=2, local=2))
    weight = np.arange(1.0, 1 + np.prod(shape), dtype=np.float32).reshape(shape)

    def body(shard):
        whole = gathered(shard, name, spec)
        p = jax.lax.axis_index(TOKEN_AXES)
        grad = summed_and_scattered(whole * (p + 1), name, spec)
        once = jnp.where(holds_first(spec), (shard**2).sum(), 0)
        return grad, jax.lax.psum(varying(once, TOKEN_AXES), TOKEN_AXES), whole[None]

    stacked = P(TOKEN_AXES)
    call = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=(spec, P(), stacked)))
    arrays = call(jax.device_put(weight, NamedSharding(mesh, spec)))
    grad, total, whole = jax.device_get(arrays)
    assert total == (weight**2).sum()
    experts = "_E" in name
    for p in range(8):
        wanted = weight[p % 4 : p % 4 + 1] if experts else weight
        np.testing.assert_array_equal(whole[p], wanted)
    # Of experts, the two data groups alone hold the same ones.
    shares = np.array([1 + 5, 2 + 6, 3 + 7, 4 + 8]) if experts else np.array([36])
    factor = shares.reshape(-1, *[1] * (len(shape) - 1))
    np.testing.assert_array_equal(grad, weight * factor)


def test_no_collective_is_made_for_what_is_whole_already():
    mesh = make_mesh(MeshConfig(data=2, node=2, local=2))
    body = jax.shard_map(
        partial(gathered, name="norm_D", spec=P(None)),
        mesh=mesh,
        in_specs=P(),
        out_specs=P(TOKEN_AXES),
    )
    text = jax.jit(body).lower(jax.device_put(np.ones(3), NamedSharding(mesh, P()))).as_text()
    assert "all_gather" not in text
