"""The grid of devices, and where weights lie on it."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import MeshConfig
from dsv3_jax.parallel.mesh import AXES, make_mesh, varying_like, weight_spec


def test_devices_are_taken_in_order_local_fastest():
    mesh = make_mesh(MeshConfig(data=2, node=2, local=2))
    assert mesh.axis_names == AXES
    assert mesh.devices.shape == (1, 2, 2, 2)
    assert list(mesh.devices.flat) == jax.devices()
    backwards = make_mesh(MeshConfig(local=2), jax.devices()[::-1])
    assert list(backwards.devices.flat) == jax.devices()[:-3:-1]


def test_too_few_devices_are_told_with_all_numbers():
    text = r"1 x 2 x 2 x 4 = 16 devices \(pipe, data, node, local\); here are 8 \(--devices 16"
    with pytest.raises(ValueError, match=text):
        make_mesh(MeshConfig(data=2, node=2, local=4))


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("moe_layers.moe.w_gate_EDF", P(None, ("node", "local"))),
        ("mtp.0.block.moe.w_down_EFD", P(("node", "local"))),
        ("moe_layers.moe.router.w_DE", P()),
        ("moe_layers.moe.shared.w_up_DF", P()),
        ("dense_layers.dense.w_down_FD", P()),
        ("embed_VD", P()),
    ],
)
def test_experts_alone_are_spread(name: str, spec: P):
    assert weight_spec(name) == spec


def test_values_take_the_axes_of_others():
    mesh = make_mesh(MeshConfig(data=2, local=4))

    def axes_of(x):
        zero = jnp.zeros(3)
        assert not jax.typeof(zero).manual_axis_type.varying
        found = varying_like({"a": zero}, {"b": x}, zero)["a"]
        assert jax.typeof(found).manual_axis_type.varying == {"data", "local"}
        return x

    spec = P(("data", "local"))
    jax.jit(jax.shard_map(axes_of, mesh=mesh, in_specs=spec, out_specs=spec)).lower(
        jax.device_put(jnp.zeros(8), jax.NamedSharding(mesh, spec))
    )
    assert varying_like(3.0 * jnp.ones(2), jnp.ones(1)).tolist() == [3.0, 3.0]  # outside: itself
