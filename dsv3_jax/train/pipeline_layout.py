"""What lies where in a pipeline: stages on ranks, parameters in stages, and who owns them
(report 3.2.1, 3.2.3).

DualPipe has every stage twice, on ranks r and P - 1 - r; and embedding and head are in several
stages where MTP is not with them. Each parameter has one owner, which keeps its master and moments:
the stage that has it as its own, on the first rank that holds that stage. Others get its weights
and send their gradients. On a rank, stages that have a parameter in common share it, under a key.
"""

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from dsv3_jax.config import RunConfig
from dsv3_jax.parallel.buckets import make_exchange_plan
from dsv3_jax.parallel.mesh import is_stacked, parameter_name
from dsv3_jax.parallel.neighbours import PER_DEVICE, rank_meshes
from dsv3_jax.parallel.schedules import operations_of
from dsv3_jax.parallel.stages import Cut
from dsv3_jax.parallel.zero import stored_spec
from dsv3_jax.quant.wide import wide
from dsv3_jax.train.optimizer import adamw
from dsv3_jax.train.sharding import RunSharding
from dsv3_jax.train.stage import Stage
from dsv3_jax.train.step import TrainState, abstract_state


class Share(NamedTuple):
    """A parameter on a rank that has not its master."""

    owner: int
    """The rank that has"""
    key: str


def key_of(stage: int, name: str) -> str:
    """A parameter's name on ranks: its owner's stage and its name there."""
    return f"{stage}.{name}"


class Layout:
    """Of one run's pipeline."""

    def __init__(
        self,
        cfg: RunConfig,
        mesh: Mesh,
        cuts: tuple[Cut, ...],
        masters: jnp.dtype = jnp.float32,
    ) -> None:
        """`masters` is the dtype of the master weights."""
        self.cfg, self.cuts, self.meshes = cfg, cuts, rank_meshes(mesh)
        self.ranks = cfg.mesh.pipe
        plan = make_exchange_plan(cfg.mesh, cfg.model)
        self.stages = [Stage(cfg, cut, plan, masters) for cut in cuts]
        example = operations_of(cfg.pipeline.schedule, self.ranks, 2 * self.ranks)
        places = [(r, c) for r in range(self.ranks) for c in range(example.chunks)]
        self.stage_of = {place: example.stage(*place) for place in places}
        self.home = {stage: example.home(stage) for stage in self.stage_numbers}
        _, self.whole = abstract_state(cfg)
        self.shardings = [
            RunSharding(self.meshes[self.rank_of(s)], plan, self._specs(stage))
            for s, stage in enumerate(self.stages)
        ]

    @property
    def stage_numbers(self) -> range:
        """From the input on."""
        return range(len(self.stages))

    @property
    def high(self) -> jnp.dtype:
        """Of sums over devices, micro-batches and ranks."""
        return wide(jnp.dtype(self.cfg.train.dtype))

    def rank_of(self, stage: int) -> int:
        """The rank that owns a stage's parameters."""
        return self.home[stage][0]

    def chunks(self, rank: int) -> dict[int, int]:
        """A rank's chunks and their stages."""
        return {chunk: stage for (r, chunk), stage in self.stage_of.items() if r == rank}

    def _specs(self, stage: Stage) -> Mapping:
        shape = dict(zip(self.meshes[0].axis_names, self.meshes[0].devices.shape, strict=True))
        return {name: stored_spec(name, x.shape, shape) for name, x in stage.shapes.items()}

    # --- parameters ------------------------------------------------------------------------------

    def owner(self, stage: int, name: str) -> int:
        """The stage that keeps the master of a parameter that this one computes with."""
        if name == "embed_VD":
            return next(s for s, cut in enumerate(self.cuts) if cut.embed)
        if name == "head_DV":
            return next(s for s, cut in enumerate(self.cuts) if cut.head)
        return stage

    @cached_property
    def keys(self) -> list[dict[str, str]]:
        """Of every stage: name -> key."""
        return [
            {name: key_of(self.owner(s, name), name) for name in stage.names}
            for s, stage in enumerate(self.stages)
        ]

    def owned(self, stage: int) -> list[str]:
        """Names of the parameters whose masters a stage keeps."""
        return [n for n in self.stages[stage].names if self.owner(stage, n) == stage]

    def on_rank(self, rank: int) -> dict[str, tuple[int, str]]:
        """Every key of a rank: (stage that owns it, its name)."""
        found = {}
        for stage in self.chunks(rank).values():
            for name, key in self.keys[stage].items():
                found[key] = (self.owner(stage, name), name)
        return found

    def borrowed(self, rank: int) -> dict[int, list[str]]:
        """Keys of a rank that other ranks own, by the owner."""
        found: dict[int, list[str]] = {}
        for key, (stage, _) in sorted(self.on_rank(rank).items()):
            if self.rank_of(stage) != rank:
                found.setdefault(self.rank_of(stage), []).append(key)
        return found

    def borrowed_stages(self, rank: int) -> dict[int, list[int]]:
        """Stages whose router biases a rank gets, by the rank that has them."""
        found: dict[int, list[int]] = {}
        for stage in self.chunks(rank).values():
            if self.rank_of(stage) != rank:
                found.setdefault(self.rank_of(stage), []).append(stage)
        return found

    def part(self, state: nnx.State, stage: int) -> nnx.State:
        """Of a stage's state, what it owns."""
        names = set(self.owned(stage))
        flat = nnx.to_flat_state(state)
        return nnx.from_flat_state(
            {path: x for path, x in flat if ".".join(map(str, path)) in names}
        )

    # --- places in the whole model ---------------------------------------------------------------

    def first_of(self, stage: int, stack: str) -> int:
        """A stage's first row among the whole model's in a stack, or its first MTP module."""
        cut, dense = self.cuts[stage], self.cfg.model.num_dense_layers
        if stack == "mtp":
            return cut.first_mtp
        bounds = (0, dense) if stack == "dense_layers" else (dense, self.cfg.model.num_layers)
        return cut.layers(*bounds).start - bounds[0]

    def router_rows(self, stage: int) -> list[int]:
        """A stage's routers among all, stacked layers first, then MTP's."""
        cut, model = self.cuts[stage], self.cfg.model
        layers = cut.layers(model.num_dense_layers, model.num_layers)
        rows = [layer - model.num_dense_layers for layer in layers]
        return rows + [model.num_moe_layers + k for k in range(cut.first_mtp, cut.end_mtp)]

    def whole_name(self, stage: int, name: str) -> str:
        """A parameter's name in the whole model."""
        first, _, rest = name.partition(".")
        if first != "mtp":
            return name
        index, _, rest = rest.partition(".")
        return f"mtp.{int(index) + self.cuts[stage].first_mtp}.{rest}"

    @cached_property
    def squares(self) -> dict[str, slice]:
        """Of every parameter of the whole model, its layers' places in the vector of squares."""
        found, start = {}, 0
        for path, x in jax.tree_util.tree_leaves_with_path(self.whole.params):
            name = parameter_name(path)
            size = x.shape[0] if is_stacked(name) else 1
            found[name] = slice(start, start + size)
            start += size
        return found

    @property
    def num_squares(self) -> int:
        return max(place.stop for place in self.squares.values())

    def squares_state(self, vector: jax.Array) -> nnx.State:
        """The vector as `squared_norms` gives it."""

        def of(path: tuple, _: jax.Array) -> jax.Array:
            name = parameter_name(path)
            part = vector[self.squares[name]]
            return part if is_stacked(name) else part[0]

        return jax.tree_util.tree_map_with_path(of, self.whole.params)

    def square_places(self, stage: int) -> jax.Array:
        """Where a stage's squares go, those of what it owns in the order of its leaves."""
        places = []
        for path, x in jax.tree_util.tree_leaves_with_path(
            self.part(self.stages[stage].params, stage)
        ):
            name = parameter_name(path)
            start = self.squares[self.whole_name(stage, name)].start
            if is_stacked(name):
                start += self.first_of(stage, name.partition(".")[0])
                places += range(start, start + x.shape[0])
            else:
                places.append(start)
        return jnp.asarray(places, jnp.int32)

    def abstract(self, stage: int) -> TrainState:
        """Shapes of the state that a stage keeps."""
        held = self.stages[stage]
        params = self.part(held.params, stage)
        optimizer = jax.eval_shape(adamw(self.cfg.optimizer).init, params)
        return TrainState(params, held.biases, optimizer)

    def shard(self, key: str, mesh: Mesh, dtype: jnp.dtype | None = None) -> jax.ShapeDtypeStruct:
        """Of a master, or of its gradient in another dtype, by device."""
        stage, name = self.place_of(key)
        held, sharding = self.stages[stage], self.shardings[stage]
        x = held.shapes[name]
        shape = NamedSharding(sharding.mesh, sharding.specs[name]).shard_shape(x.shape)
        return self._per_device(mesh, shape, dtype or x.dtype)

    def place_of(self, key: str) -> tuple[int, str]:
        """The stage that owns a key, and its name there."""
        return self._by_key[key]

    def state_of(self, stage: int, arrays: Mapping[str, jax.Array]) -> nnx.State:
        """Arrays by key in the structure of what a stage owns."""
        return jax.tree_util.tree_map_with_path(
            lambda path, _: arrays[key_of(stage, parameter_name(path))],
            self.part(self.stages[stage].params, stage),
        )

    def message(self, mesh: Mesh, rows: int) -> jax.ShapeDtypeStruct:
        """What stages hand on of a micro-batch of so many rows."""
        cfg = self.cfg
        shape = rows * cfg.mesh.row_shards, cfg.part_length, cfg.model.d_model
        place = NamedSharding(mesh, PER_DEVICE)
        return jax.ShapeDtypeStruct(shape, self.stages[0].dtype, sharding=place)

    @cached_property
    def _by_key(self) -> dict[str, tuple[int, str]]:
        return {key_of(s, name): (s, name) for s in self.stage_numbers for name in self.owned(s)}

    def by_device(
        self, keys: Iterable[str], stages: Iterable[int], mesh: Mesh
    ) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[int, nnx.State]]:
        """Shapes of masters and of stages' router biases as they cross to other ranks."""
        biases = {
            stage: jax.tree.map(
                lambda x: self._per_device(mesh, x.shape, x.dtype), self.stages[stage].biases
            )
            for stage in stages
        }
        return {key: self.shard(key, mesh) for key in keys}, biases

    def _per_device(
        self, mesh: Mesh, shape: tuple[int, ...], dtype: jnp.dtype
    ) -> jax.ShapeDtypeStruct:
        place = NamedSharding(mesh, PER_DEVICE)
        return jax.ShapeDtypeStruct((mesh.size, *shape), dtype, sharding=place)
