"""The bytes of a run's state, against those of its abstract arrays in their shards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import DataConfig, MeshConfig, RunConfig, TrainConfig
from dsv3_jax.parallel.mesh import parameter_name, weight_spec
from dsv3_jax.train import memory
from dsv3_jax.train.memory import check_memory, state_bytes
from dsv3_jax.train.sharding import make_sharding
from dsv3_jax.train.step import abstract_state
from tests.shapes import tiny_model


def run(**mesh: int) -> RunConfig:
    train, data = TrainConfig(rows=8), DataConfig(length=8)
    return RunConfig(tiny_model(num_experts=16), data, train, mesh=MeshConfig(**mesh))


@pytest.mark.parametrize(
    "mesh", [{}, {"data": 8}, {"data": 2, "node": 2, "local": 2}, {"local": 4}]
)
def test_bytes_are_those_of_the_arrays(mesh: dict):
    """But for gains and biases, which are small and whole on every device."""
    cfg = run(**mesh)
    shapes = abstract_state(cfg)[1]
    sharding = make_sharding(cfg, shapes.params)
    stored = computed = 0
    for path, x in jax.tree_util.tree_leaves_with_path(shapes.params):
        name = parameter_name(path)
        local, whole = x.size, x.size
        if sharding.mesh:
            local = np.prod(shard_shape(sharding, x.shape, sharding.specs[name]))
            whole = np.prod(shard_shape(sharding, x.shape, weight_spec(name)))
        stored += local * (4 + 2 * jnp.bfloat16.dtype.itemsize)
        computed += whole * (8 if sharding.mesh else 4)
    assert state_bytes(cfg) == pytest.approx(stored + computed, rel=0.03)


def shard_shape(sharding, shape, spec) -> tuple[int, ...]:
    return jax.NamedSharding(sharding.mesh, spec).shard_shape(shape)


def test_emulated_devices_share_the_machine(monkeypatch: pytest.MonkeyPatch):
    cfg = run(data=2, node=2, local=2)
    monkeypatch.setattr(memory, "memory_size", lambda: 8 * state_bytes(cfg))
    check_memory(cfg)
    monkeypatch.setattr(memory, "memory_size", lambda: 8 * state_bytes(cfg) - 1)
    with pytest.raises(ValueError, match=r"moments and gradients and gathered weights .* machine"):
        check_memory(cfg)
