"""The engine's programs, compiled once for each size, and where their arrays lie.

On a mesh every device has rows, pages and loads of its own, the first dimension of all of these,
and experts are spread over node and local. Without one, all is on one device.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import GetAttrKey

from dsv3_jax.inference.cache import empty_pool
from dsv3_jax.inference.forward import Experts
from dsv3_jax.inference.moved_pages import Contents, Places, read_pages, write_pages
from dsv3_jax.inference.settings import EngineConfig
from dsv3_jax.inference.speculative import Verdict
from dsv3_jax.inference.statistics import Statistics
from dsv3_jax.inference.step import (
    Chunk,
    Lease,
    ReadScores,
    State,
    empty_rows,
    go_on,
    read_chunks,
)
from dsv3_jax.inference.weights import Weights
from dsv3_jax.parallel.mesh import TOKEN_AXES, weight_spec

_SHARDED, _STEPS = PartitionSpec(TOKEN_AXES), PartitionSpec(None, TOKEN_AXES)

COMPILER_OPTIONS: dict[str, Any] = {}
_OF_A_VARIABLE = ("value", "values", "scales")  # its one array, or the two of a `Blocked`


class Programs:
    """`read` and `go_on`, `read_pages` and `write_pages`; `compiled` counts what was compiled."""

    def __init__(
        self, experts: Experts, mesh: Mesh | None, settings: EngineConfig, statistics: Statistics
    ) -> None:
        self.experts, self.mesh, self.top = experts, mesh, settings.top_logprobs
        self.scores = settings.prompt_logprobs
        self.shards = int(np.prod([mesh.shape[axis] for axis in TOKEN_AXES])) if mesh else 1
        self._statistics = statistics
        self._compiled: dict[Any, Callable] = {}

    @property
    def compiled(self) -> int:
        """Programs so far."""
        return len(self._compiled)

    def empty_state(self, weights: Weights, settings: EngineConfig, pages: int) -> State:
        """Pools, rows and loads of nobody."""
        cfg, dtype = weights.rest.cfg, weights.rest.embed_VD.dtype
        layers, shards = len(weights.layers) + len(weights.depths), self.shards
        loads = sum(hasattr(layer.block, "moe") for layer in weights.layers) + len(weights.depths)
        num_experts = cfg.num_experts + self.experts.shared_as_routed * cfg.num_shared_experts

        def make() -> State:
            pools = tuple(
                empty_pool(cfg, shards * pages, settings.page_slots, dtype, settings.fp8_cache)
                for _ in range(layers)
            )
            rows = empty_rows(shards * settings.rows, len(weights.depths), cfg.d_model, dtype)
            return State(pools, rows, jnp.zeros((shards * loads, num_experts), jnp.int32))

        if self.mesh is None:
            return jax.jit(make)()
        with jax.set_mesh(self.mesh):
            return jax.jit(make, out_shardings=NamedSharding(self.mesh, _SHARDED))()

    def no_loads(self, state: State) -> jax.Array:
        """Zeros that lie as the state's loads."""
        return jax.device_put(np.zeros_like(state.load_LE), state.load_LE.sharding)

    def read(
        self,
        weights: Weights,
        state: State,
        chunks: Sequence[Chunk],
        leases: Sequence[Lease],
        fresh: bool,
    ) -> tuple[State, list[Verdict], list[ReadScores]]:
        """`step.read_chunks`, of chunks and leases in NumPy; the state is used up."""
        kind = {"fresh": fresh, "top": self.top, "scores": self.scores}
        body = partial(read_chunks, experts=self.experts, **kind)
        specs = (_SHARDED, _SHARDED), (_SHARDED, _SHARDED, _SHARDED)
        return self._run(("read", fresh), body, *specs, weights, state, list(chunks), list(leases))

    def go_on(
        self, weights: Weights, state: State, lease: Lease, active_B: np.ndarray, count: int
    ) -> tuple[State, Verdict]:
        """`step.go_on`, of a lease in NumPy; the state is used up."""
        body = partial(go_on, experts=self.experts, top=self.top)
        specs = (_SHARDED, _SHARDED, PartitionSpec()), (_SHARDED, _STEPS)
        return self._run("go_on", body, *specs, weights, state, lease, active_B, np.int32(count))

    def read_pages(self, weights: Weights, state: State, places: Places) -> tuple[State, Contents]:
        """`moved_pages.read_pages`, of places in NumPy; the state is used up."""
        specs = (_SHARDED,), (_SHARDED, _SHARDED)
        return self._run("read pages", _without_weights(read_pages), *specs, weights, state, places)

    def write_pages(
        self, weights: Weights, state: State, places: Places, contents: Contents
    ) -> State:
        """`moved_pages.write_pages`, of places and contents in NumPy; the state is used up."""
        specs, body = ((_SHARDED, _SHARDED), _SHARDED), _without_weights(write_pages)
        return self._run("write pages", body, *specs, weights, state, places, contents)

    def _run(
        self,
        name: Any,
        body: Callable,
        specs: Any,
        out_specs: Any,
        weights: Any,
        state: Any,
        *args: Any,
    ) -> Any:
        args = self._placed(args, specs)
        key = name, tuple(leaf.shape for leaf in jax.tree.leaves((args, state.load_LE)))
        if key not in self._compiled:
            with self._statistics.measured("compiling"):
                self._compiled[key] = self._compile(body, specs, out_specs, weights, state, args)
        return self._compiled[key](weights, state, *args)

    def _placed(self, args: Any, specs: Any) -> Any:
        """On the devices."""
        if self.mesh is None:
            return args
        return tuple(
            jax.device_put(arg, NamedSharding(self.mesh, spec))
            for arg, spec in zip(args, specs, strict=True)
        )

    def _compile(
        self, body: Callable, specs: Any, out_specs: Any, weights: Any, state: Any, args: Any
    ) -> Callable:
        if self.mesh is not None:
            body = jax.shard_map(
                body,
                mesh=self.mesh,
                in_specs=(weight_specs(weights), _SHARDED, *specs),
                out_specs=out_specs,
            )
        lowered = jax.jit(body, donate_argnums=1).lower(weights, state, *args)
        return lowered.compile(COMPILER_OPTIONS or None)


def _without_weights(body: Callable) -> Callable:
    """For programs that look at none."""
    return lambda weights, *args: body(*args)


def placed(weights: Weights, mesh: Mesh | None) -> Weights:
    """On the mesh."""
    if mesh is None:
        return weights
    return jax.device_put(
        weights, jax.tree.map(lambda spec: NamedSharding(mesh, spec), weight_specs(weights))
    )


def weight_specs(weights: Weights) -> Weights:
    """How each of them lies on a mesh: experts spread, all else whole."""

    def spec(path: tuple, x: jax.Array) -> PartitionSpec:
        names = [key.name for key in path if isinstance(key, GetAttrKey)]
        if "placement" in names:
            return PartitionSpec()
        return weight_spec(next(name for name in reversed(names) if name not in _OF_A_VARIABLE))

    return jax.tree_util.tree_map_with_path(spec, weights)
