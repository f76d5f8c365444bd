"""The average of the weights: its formula, and that it lives in host memory."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.train.ema import in_device_memory, make_update, on_host
from tests.shapes import normal


def test_the_average_follows_its_formula_in_host_memory():
    weights = [nnx.State({"w": nnx.Param(normal(seed, 3, 4))}) for seed in range(3)]
    average = on_host(weights[0])
    update = make_update(weights[0], 0.75)
    expected = np.asarray(weights[0]["w"][...])
    for params in weights[1:]:
        average = update(average, params)
        expected = 0.75 * expected + 0.25 * np.asarray(params["w"][...])
    (leaf,) = jax.tree.leaves(average)
    assert leaf.sharding.memory_kind == "pinned_host"
    np.testing.assert_allclose(leaf, expected, rtol=1e-6)
    (near,) = jax.tree.leaves(in_device_memory(average))
    assert near.sharding.memory_kind != "pinned_host"
    np.testing.assert_array_equal(near, leaf)


def test_weights_may_be_donated_right_after_the_update():
    """As the next step does: the average has read them by then."""
    params = nnx.State({"w": nnx.Param(jnp.ones((64, 64)))})
    average = on_host(params)
    update = make_update(params, 0.5)
    step = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)
    for _ in range(4):
        params = step(params)
        average = update(average, params)
    (leaf,) = jax.tree.leaves(average)
    expected = 1.0
    for value in (2, 3, 4, 5):
        expected = 0.5 * expected + 0.5 * value
    np.testing.assert_allclose(leaf, np.full((64, 64), expected), rtol=1e-6)
