"""One step of a small model on a pipeline, and the same step on one device."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from dsv3_jax.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PipelineConfig,
    QuantConfig,
    RunConfig,
    TrainConfig,
)
from dsv3_jax.data.loader import Batch
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.pipeline import Executed
from dsv3_jax.parallel.schedules import Schedule
from dsv3_jax.parallel.stages import cut
from dsv3_jax.train.pipeline import Pipeline
from dsv3_jax.train.pipeline_layout import Layout
from dsv3_jax.train.pipeline_state import by_stage, from_whole, joined, to_whole
from dsv3_jax.train.step import Coefficients, StepMetrics, TrainState
from tests.shapes import FAST_COMPILATION, random_tokens, tiny_model
from tests.train.margins import routing_margin
from tests.train.telling_step import make_telling_step
from tests.train.test_step import coefficients, state_of

CLIP = 0.05


@dataclass(frozen=True)
class Case:
    """What a step is compared on."""

    schedule: str
    mesh: str
    """pipe x node x local"""
    microbatches: int
    stages: str = ""
    layers: int = 3
    mtp: int = 1
    rows: int = 1
    """Of a micro-batch on one device, or on those that share them"""
    dtype: str = "float64"
    recipe: str = "dtype"
    remat: str = "none"
    length: int = 5
    dense: int = 1
    experts: int = 16
    kv_latent: int = 16
    isolate: bool = False
    tied: bool = False
    skewed: bool = False
    """All tokens to the same experts"""
    data: int = 1
    """Groups of node x local"""
    ramp: int = 1
    """The step has this many times fewer rows, and micro-batches, than the run's later ones"""
    sequence: str = "none"
    """`mesh.sequence`: the devices that share a row"""
    weighted: bool = False
    """Labels have weights, as in reinforcement learning, and rows are isolated"""

    def __str__(self) -> str:
        said = [self.schedule, self.mesh, self.microbatches, self.stages or "balanced"]
        said += [f"{self.layers}+{self.mtp}", self.dtype, self.recipe, self.remat]
        said += [f"data {self.data}"] * (self.data > 1)
        said += [f"rows over {self.sequence}"] * (self.sequence != "none")
        return " ".join(map(str, said)) + "".join(
            f" {name}" for name in ("isolate", "tied", "skewed", "weighted") if getattr(self, name)
        )

    @property
    def sizes(self) -> tuple[int, int, int]:
        pipe, node, local = map(int, self.mesh.split("x"))
        return pipe, node, local

    @property
    def devices(self) -> int:
        """Of a rank."""
        return self.data * self.sizes[1] * self.sizes[2]

    @property
    def groups(self) -> int:
        """Of devices of a rank that have rows of their own."""
        return self.config.mesh.row_groups

    @property
    def model(self) -> ModelConfig:
        return tiny_model(
            num_layers=self.layers,
            num_dense_layers=self.dense,
            num_experts=self.experts,
            q_latent=None,
            kv_latent=self.kv_latent,
            mtp_depth=self.mtp,
            tied_head=self.tied,
        )

    @property
    def config(self) -> RunConfig:
        pipe, node, local = self.sizes
        count = self.microbatches * self.ramp
        mesh = MeshConfig(pipe, self.data, node, local, bucket_factor=1.0, sequence=self.sequence)
        return RunConfig(
            model=self.model,
            data=DataConfig(
                length=self.length,
                isolate=self.isolate or self.weighted,
                format="prompts" if self.weighted else "text",
            ),
            train=TrainConfig(
                rows=self.rows * count * mesh.row_groups,
                microbatches=count,
                dtype=self.dtype,
                remat=self.remat,
            ),
            optimizer=OptimizerConfig(moment_dtype="float32", clip_norm=CLIP),
            mesh=mesh,
            quant=QuantConfig(self.recipe),
            pipeline=PipelineConfig(self.schedule, self.stages),
        )

    @property
    def plain(self) -> "Case":
        """The case that has the same step on one device."""
        alone = {"mesh": "1x1x1", "data": 1, "sequence": "none"}
        return replace(self, schedule="1f1b", stages="", rows=self.rows * self.groups, **alone)

    @property
    def masters(self) -> jnp.dtype:
        return jnp.dtype("float64" if self.dtype == "float64" else "float32")


class Outcome(NamedTuple):
    """Of one step, all on the host."""

    grads: nnx.State
    """Before clipping"""
    state: TrainState
    metrics: StepMetrics


def batch_of(case: Case) -> Batch:
    """Rows have none to all labels that count; and, if isolated, two or three segments."""
    rows, length = case.rows * case.microbatches * case.groups, case.length
    sequence = np.asarray(random_tokens(case.model, rows, length + 1))
    draw = np.random.default_rng(0)
    lengths_B1 = draw.integers(0, length + 1, (rows, 1))
    labels = np.where(np.arange(length)[None] < lengths_B1, sequence[:, 1:], -1)
    starts_BT = draw.integers(0, 2, (rows, length)).astype(np.int32)
    segments = np.cumsum(starts_BT, axis=1, dtype=np.int32)
    weights = draw.standard_normal((rows, length)).astype(case.masters) if case.weighted else None
    isolated = case.config.data.isolate
    return Batch(sequence[:, :-1], labels, segments if isolated else None, weights)


def state_for(case: Case) -> tuple[nnx.GraphDef, TrainState]:
    graphdef, state = state_of(case.config, case.masters)
    if case.skewed:

        def lean(bias: jax.Array) -> jax.Array:
            return bias.at[..., 2:4].add(10.0)

        state = state._replace(biases=jax.tree.map(lean, state.biases))
    return graphdef, state


def numbers() -> Coefficients:
    return coefficients(0.01, 0.003)


def pipeline_of(case: Case) -> Pipeline:
    cfg, pipe = case.config, case.sizes[0]
    stages = pipe * (2 if case.schedule == "dualpipev" else 1)
    costs = [1.0] * (2 + case.layers + case.mtp)
    cuts = cut(case.stages, stages, case.layers, case.mtp, costs)
    layout = Layout(cfg, make_mesh(cfg.mesh), cuts, case.masters)
    return Pipeline(cfg, layout, FAST_COMPILATION)


class Walked(NamedTuple):
    """A step on a pipeline."""

    outcome: Outcome
    pipeline: Pipeline
    schedule: Schedule
    executed: Executed


def walked(case: Case, batch: Batch | None = None) -> Walked:
    """A step, twice: once for gradients as they lie before the update, once whole."""
    pipeline, batch = pipeline_of(case), batch or batch_of(case)
    # From the host, where parts are cut without a program for each.
    state = from_whole(pipeline.layout, jax.device_get(state_for(case)[1]))
    steps, schedule = pipeline.begin(by_stage(state), batch, numbers().mtp_weight)
    executed = pipeline.walk(schedule, steps)
    grads, _ = pipeline.reduce(steps)
    grads = whole_gradients(pipeline, grads)
    after, metrics = pipeline.step(state, batch, numbers())
    outcome = Outcome(
        grads, jax.device_get(to_whole(pipeline.layout, after)), jax.device_get(metrics)
    )
    return Walked(outcome, pipeline, schedule, executed)


def whole_gradients(pipeline: Pipeline, grads: dict[int, dict[str, jax.Array]]) -> nnx.State:
    """The whole model's, from each owner's shards by device."""
    layout, parts = pipeline.layout, []
    for stage in layout.stage_numbers:
        own = grads[layout.rank_of(stage)]

        def of(path: tuple, like: nnx.Variable, stage: int = stage, own: dict = own):
            name = ".".join(map(str, path))
            return like.replace(_joined(layout, stage, name, like.shape, own[f"{stage}.{name}"]))

        parts.append(nnx.map_state(of, layout.part(layout.stages[stage].params, stage)))
    return joined(layout, layout.whole.params, parts)


def _joined(layout: Layout, stage: int, name: str, shape: tuple, grad: jax.Array) -> np.ndarray:
    sharding = layout.shardings[stage]
    place = NamedSharding(sharding.mesh, sharding.specs[name])
    where = place.devices_indices_map(shape)
    whole = np.full(shape, np.nan, grad.dtype)
    for shard in grad.addressable_shards:
        whole[where[shard.device]] = np.asarray(shard.data)[0]
    return whole


@cache
def plain_step(cfg: RunConfig, masters: jnp.dtype) -> Callable:
    """The step's program, with its gradients."""
    step = make_telling_step(state_of(cfg, masters)[0], cfg)
    return lambda *args: step.lower(*args).compile(FAST_COMPILATION)(*args)


@cache
def expected(plain: Case) -> Outcome:
    """One device's."""
    batch = jax.tree.map(jnp.asarray, batch_of(plain))
    step = plain_step(plain.config, plain.masters)
    (after, metrics), grads = jax.device_get(step(state_for(plain)[1], batch, numbers()))
    return Outcome(grads, after, metrics)


def without_traffic(outcome: Outcome) -> Any:
    return outcome._replace(metrics=outcome.metrics._replace(traffic=None))


def margin_of(case: Case) -> float:
    graphdef, state = state_for(case)
    batch = jax.tree.map(jnp.asarray, batch_of(case))
    train = replace(case.plain, remat="none").config.train  # so that each layer is met once
    return routing_margin(case.model, graphdef, state, batch, train)
