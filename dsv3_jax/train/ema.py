"""The moving average of the weights in host memory (report 3.2.3; its decay is unpublished).

The average lives in pinned host memory. Its update is dispatched behind a step and not waited for:
the device reads the new weights and the old average while the next batch is fetched.
"""

from collections.abc import Callable

import jax
from flax import nnx

HOST = "pinned_host"


def on_host(params: nnx.State) -> nnx.State:
    """A copy of the weights in host memory: the average before the first update."""
    return jax.device_put(params, _shardings(params, HOST))


def in_device_memory(average: nnx.State) -> nnx.State:
    """The average where a model can use it."""
    return jax.device_put(average, _shardings(average, "device"))


def make_update(params: nnx.State, decay: float) -> Callable[[nnx.State, nnx.State], nnx.State]:
    """Compiled `update(average, params) -> average`: decay * average + (1 - decay) * params.

    The old average is donated.
    """
    device = jax.tree.map(lambda x: x.sharding, params)

    def update(average: nnx.State, params: nnx.State) -> nnx.State:
        average = jax.device_put(average, device)
        return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, params)

    return jax.jit(update, out_shardings=_shardings(params, HOST), donate_argnums=0)


def _shardings(params: nnx.State, memory: str) -> nnx.State:
    return jax.tree.map(lambda x: x.sharding.with_memory_kind(memory), params)
