"""How a run's state lies on its devices, and the collectives of a step; on one device, nothing.

The step is written once. What it asks here is a sum, a gather or a scatter inside of a `shard_map`,
and the identity on one device.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from optax.tree_utils import tree_set

from dsv3_jax.config import RunConfig
from dsv3_jax.config.mesh import AXES
from dsv3_jax.data.loader import Batch
from dsv3_jax.parallel import processes
from dsv3_jax.parallel.buckets import ExchangePlan, make_exchange_plan
from dsv3_jax.parallel.mesh import TOKEN_AXES, make_mesh, parameter_name, varying
from dsv3_jax.parallel.sequence import RowPlaces
from dsv3_jax.parallel.zero import gathered, holds_first, stored_spec, summed_and_scattered

ROWS = PartitionSpec(TOKEN_AXES)
WHOLE = PartitionSpec()


@dataclass(frozen=True)
class RunSharding:
    """Of one run; `mesh` None for one device."""

    mesh: Mesh | None = None
    plan: ExchangePlan | None = None
    """Of the exchange with experts on other devices"""
    specs: Mapping[str, PartitionSpec] | None = None
    """Of every master, by its parameter's name"""

    @property
    def axes(self) -> tuple[str, ...]:
        """Those over which tokens differ."""
        return TOKEN_AXES if self.mesh else ()

    @property
    def places(self) -> RowPlaces:
        """Of rows on devices."""
        rows = self.plan.rows if self.plan else None
        return RowPlaces(self.token_shards, rows.size if rows else 1)

    @property
    def row_groups(self) -> int:
        """Groups of devices that have rows of their own."""
        return self.places.groups

    @property
    def row_spec(self) -> PartitionSpec:
        """Of something for each row of a batch."""
        shared = self.plan.rows.axes if self.plan and self.plan.rows else ()
        return PartitionSpec(tuple(axis for axis in self.axes if axis not in shared))

    @property
    def token_shards(self) -> int:
        """Devices that have tokens of their own."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes) if self.mesh else 1

    # --- inside a step ---------------------------------------------------------------------------

    def gather(self, params: nnx.State) -> nnx.State:
        """Masters as a model takes them: experts of this device, all else whole."""
        return self._by_name(gathered, params)

    def reduce(self, grads: nnx.State) -> nnx.State:
        """The whole step's gradient of this device's masters, from each device's own."""
        return self._by_name(summed_and_scattered, grads)

    def sum(self, tree: Any) -> Any:
        """Over devices; what is the same everywhere counts once for each."""
        return lax.psum(self.differing(tree), self.axes) if self.mesh else tree

    def max(self, tree: Any) -> Any:
        """Over devices."""
        return lax.pmax(self.differing(tree), self.axes) if self.mesh else tree

    def of_rows(self, is_so_B: jax.Array) -> jax.Array:
        """bool: what holds of all parts of a row, from what holds of this device's."""
        if not (self.plan and self.plan.rows):
            return is_so_B
        return self.plan.rows.sum((~is_so_B).astype(jnp.int32)) == 0

    def sum_of_shards(self, tree: nnx.State) -> nnx.State:
        """Of numbers that each device has of its own shards of masters, the whole masters'.

        A shard that several devices hold counts once; all numbers go in one collective.
        """
        if not self.mesh:
            return tree

        def own(path: tuple, x: jax.Array) -> jax.Array:
            return jnp.where(holds_first(self.specs[parameter_name(path)]), x, 0)

        flat, restored = ravel_pytree(jax.tree_util.tree_map_with_path(own, tree))
        return restored(self.sum(flat))

    def differing(self, tree: Any) -> Any:
        """The same values, typed as differing over devices."""
        return varying(tree, self.axes)

    def _by_name(self, change: Callable, params: nnx.State) -> nnx.State:
        if not self.mesh:
            return params

        def of(path: tuple, x: jax.Array) -> jax.Array:
            name = parameter_name(path)
            return change(x, name, self.specs[name])

        return jax.tree_util.tree_map_with_path(of, params)

    # --- around it -------------------------------------------------------------------------------

    def per_device(self, f: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """`f` as every device runs it on its own parts."""
        if not self.mesh:
            return f
        return jax.shard_map(f, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)

    def param_specs(self, params: nnx.State) -> nnx.State:
        """Specs of masters, moments or whatever has their structure."""
        return jax.tree_util.tree_map_with_path(
            lambda path, _: self.specs[parameter_name(path)] if self.mesh else WHOLE, params
        )

    def state_specs(self, state: Any) -> Any:
        """Specs of a `TrainState`, abstract or not."""
        params = self.param_specs(state.params)
        optimizer = jax.tree.map(lambda _: WHOLE, state.optimizer)
        optimizer = tree_set(optimizer, mu=params, nu=params)
        return state._replace(
            params=params, biases=jax.tree.map(lambda _: WHOLE, state.biases), optimizer=optimizer
        )

    def placements(self, specs: Any) -> Any:
        """Of specs, for `jax.device_put` and compiled programs; None on one device."""
        if not self.mesh:
            return None
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)

    def placed_shapes(self, state: Any) -> Any:
        """An abstract `TrainState` whose arrays know where they lie."""
        if not self.mesh:
            return state
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            state,
            self.placements(self.state_specs(state)),
        )

    @cached_property
    def row_placement(self) -> NamedSharding | None:
        """Where the rows of a batch go."""
        return self.placements(ROWS)

    def own_rows(self, rows: int) -> Sequence[int]:
        """Which of a batch's rows lie on devices of this process, in order."""
        if processes.count() == 1:
            return range(rows)
        indices = self.row_placement.addressable_devices_indices_map((self.token_shards,))
        devices = [part.start or 0 for (part,) in indices.values()]
        return self.places.own_rows(devices, rows)

    def put_rows(self, batch: Batch, rows: int | None = None) -> Batch:
        """A batch on its devices, as parts of rows where devices share them. In several processes
        `batch` has this one's `own_rows` of `rows` rows.
        """
        places, alone = self.places, processes.count() == 1
        if alone and places.shards == 1:
            return jax.device_put(batch, self.row_placement)
        rows = len(batch.tokens_BT) if alone else rows
        found = {row: i for i, row in enumerate(self.own_rows(rows))}

        def put(x: np.ndarray | None) -> jax.Array | None:
            if x is None:
                return None

            def part(index: tuple[slice, ...]) -> np.ndarray:
                device = (index[0].start or 0) * places.groups // rows
                own = [found[row] for row in places.rows_of(device, rows)]
                return places.part(np.asarray(x)[own], device)

            shape = rows * places.shards, x.shape[1] // places.shards
            return jax.make_array_from_callback(shape, self.row_placement, part)

        return Batch(*map(put, batch))

    def on_one_device(self, tree: Any) -> Any:
        """All of it on the first device, for programs that know of one; None in the processes that
        have not got it. All processes must ask.
        """
        if not self.mesh:
            return tree
        if processes.count() > 1:
            found = jax.tree.map(self._in_first_process, tree)
            return found if processes.is_first() else None
        # A device instead of a sharding would leave the arrays' types those of the mesh.
        return jax.device_put(tree, SingleDeviceSharding(self.mesh.devices.flat[0]))

    def _in_first_process(self, x: jax.Array) -> jax.Array | None:
        """A whole array on its first device. For a moment every device has a copy."""
        copies = jax.device_put(x, NamedSharding(self.mesh, WHOLE))
        first = self.mesh.devices.flat[0]
        return next((s.data for s in copies.addressable_shards if s.device == first), None)


ONE_DEVICE = RunSharding()


def make_sharding(cfg: RunConfig, params: nnx.State) -> RunSharding:
    """Of a run whose masters, abstract or not, are these. ValueError if devices are lacking."""
    if cfg.mesh.size == 1:
        return ONE_DEVICE
    mesh = make_mesh(cfg.mesh)
    specs = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = parameter_name(path)
        specs[name] = stored_spec(name, x.shape, mesh.shape)
    return RunSharding(mesh, make_exchange_plan(cfg.mesh, cfg.model), specs)


def described(cfg: RunConfig) -> str:
    """In a line, what each device of a mesh has."""
    mesh, axes = cfg.mesh, []
    for axis in AXES:
        size = getattr(mesh, axis)
        axes += [f"{axis} {size}"] if size > 1 else []
    rows = cfg.train.rows // cfg.train.microbatches // mesh.row_groups
    experts = cfg.model.num_experts // mesh.expert_shards
    part = f"1/{mesh.row_shards} of {rows}" if mesh.row_shards > 1 else f"{rows}"
    return (
        f"{' x '.join(axes)}: a device has {experts} of {cfg.model.num_experts} experts, and "
        f"{part} of a micro-batch's rows"
    )
