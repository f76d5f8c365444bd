"""The moving average of the weights in host memory (report 3.2.3; its decay is unpublished).

The average lives in pinned host memory. Its update is dispatched behind a step and not waited for:
the device reads the new weights and the old average while the next batch is fetched.
"""

from collections.abc import Callable
from typing import Any

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

    The old average is donated. Ranks of a pipeline have a program each: a program's arrays are all
    on the same devices.
    """
    places: dict[frozenset, list[int]] = {}
    for i, x in enumerate(jax.tree.leaves(params)):
        places.setdefault(frozenset(x.sharding.device_set), []).append(i)
    programs = [
        (part, _program([jax.tree.leaves(params)[i] for i in part], decay))
        for part in places.values()
    ]

    def update(average: nnx.State, params: nnx.State) -> nnx.State:
        averages, tree = jax.tree.flatten(average)
        leaves = jax.tree.leaves(params)
        for part, program in programs:
            found = program([averages[i] for i in part], [leaves[i] for i in part])
            for i, x in zip(part, found, strict=True):
                averages[i] = x
        return tree.unflatten(averages)

    return update


def _program(params: list[jax.Array], decay: float) -> Callable:
    device = [x.sharding for x in params]

    def update(average: list[jax.Array], params: list[jax.Array]) -> list[jax.Array]:
        average = jax.device_put(average, device)
        return [a + (1 - decay) * (p - a) for a, p in zip(average, params, strict=True)]

    return jax.jit(update, out_shardings=_shardings(params, HOST), donate_argnums=0)


def _shardings(params: Any, memory: str) -> Any:
    return jax.tree.map(lambda x: x.sharding.with_memory_kind(memory), params)
