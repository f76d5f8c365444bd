"""The step on a mesh is the step on one device: loss, every gradient, every weight and moment.

In float64, where a missing or doubled term is far above rounding. One device is the oracle.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from optax.tree_utils import tree_get

from dsv3_jax.config import (
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    QuantConfig,
    RunConfig,
    TrainConfig,
)
from dsv3_jax.data.loader import Batch
from dsv3_jax.parallel.dispatch import Traffic
from dsv3_jax.parallel.mesh import TOKEN_AXES, parameter_name
from dsv3_jax.train.exchange_records import bytes_of_row, exchange_entry
from dsv3_jax.train.sharding import ONE_DEVICE, ROWS, WHOLE, make_sharding
from dsv3_jax.train.step import (
    StepMetrics,
    StepTraffic,
    TrainState,
    gradients,
    step_traffic,
)
from tests.runs import spread
from tests.shapes import FAST_COMPILATION, compiled, random_tokens, tiny_model
from tests.tolerances import FLOAT32, FLOAT64, assert_close
from tests.train.margins import routing_margin
from tests.train.telling_step import make_telling_step
from tests.train.test_step import coefficients, state_of

T, ROWS_OF_A_STEP = 5, 16
SHAPES = ("1x1x8", "8x1x1", "1x2x4", "2x2x2", "1x4x2", "4x1x2")


def run_of(shape: str, mtp: int, microbatches: int, dtype: str = "float64") -> RunConfig:
    data, node, local = map(int, shape.split("x"))
    return RunConfig(
        model=tiny_model(
            num_layers=2 - mtp,  # a dense layer, and one with experts: the last or MTP's
            num_experts=16,
            q_latent=None,
            mtp_depth=mtp,
        ),
        data=DataConfig(length=T),
        train=TrainConfig(rows=ROWS_OF_A_STEP, microbatches=microbatches, dtype=dtype),
        optimizer=OptimizerConfig(moment_dtype="float32"),
        mesh=MeshConfig(1, data, node, local, bucket_factor=1.0),
    )


def batch_of(cfg: RunConfig) -> Batch:
    """Rows have 0 to 5 labels that count, so devices have unequal numbers."""
    sequence = random_tokens(cfg.model, ROWS_OF_A_STEP, T + 1)
    lengths_B1 = np.random.default_rng(0).integers(0, T + 1, (ROWS_OF_A_STEP, 1))
    labels = jnp.where(jnp.arange(T)[None] < lengths_B1, sequence[:, 1:], -1)
    return Batch(sequence[:, :-1], labels)


class Outcome(NamedTuple):
    """Of one step on a mesh: loss and gradients before the update, and if asked for all else."""

    loss: jax.Array
    grads: nnx.State
    state: TrainState | None = None
    metrics: StepMetrics | None = None


Step = Callable[[TrainState, Batch], tuple[tuple[TrainState, StepMetrics], nnx.State]]


@cache
def step_program(cfg: RunConfig) -> Step:
    """The compiled step on the mesh, with its gradients; it puts its arguments in their places."""
    graphdef, state = state_of(cfg, jnp.dtype(cfg.train.dtype))
    sharding = make_sharding(cfg, state.params)
    numbers = coefficients(0.01, 0.003)
    arguments = sharding.placed_shapes(state), sharding.put_rows(batch_of(cfg)), numbers
    step = make_telling_step(graphdef, cfg, sharding).lower(*arguments).compile(FAST_COMPILATION)
    return lambda state, batch: step(spread(state, sharding), sharding.put_rows(batch), numbers)


def outcome(cfg: RunConfig, *, whole: bool) -> Outcome:
    graphdef, state = state_of(cfg, jnp.dtype(cfg.train.dtype))
    if whole:
        (after, metrics), grads = step_program(cfg)(state, batch_of(cfg))
        return Outcome(metrics.loss, grads, after, metrics)
    sharding = make_sharding(cfg, state.params)
    state = spread(state, sharding)
    batch = sharding.put_rows(batch_of(cfg))

    def grads(state, batch, mtp_weight):
        return gradients(graphdef, state, batch, mtp_weight, cfg, sharding)[:2]

    specs = sharding.state_specs(state)
    body = sharding.per_device(grads, (specs, ROWS, WHOLE), (WHOLE, specs.params))
    return Outcome(*compiled(body)(state, batch, coefficients(0.01, 0.003).mtp_weight))


@cache
def expected(mtp: int, microbatches: int, dtype: str, whole: bool) -> Outcome:
    with jax.enable_x64(dtype == "float64"):
        cfg = run_of("1x1x1", mtp, microbatches, dtype)
        assert make_sharding(cfg, None) is ONE_DEVICE
        return jax.device_get(outcome(cfg, whole=whole))


def compare(found: Outcome, mtp: int, microbatches: int, dtype: str = "float64") -> None:
    """With one device's."""
    whole = found.metrics is not None
    if whole:
        found = found._replace(metrics=found.metrics._replace(traffic=None))
    tolerance = FLOAT64 if dtype == "float64" else FLOAT32
    assert_close(jax.device_get(found), expected(mtp, microbatches, dtype, whole), tolerance)


@pytest.fixture(scope="module")
def stepped():
    """A mesh with all axes, MTP, micro-batches."""
    with jax.enable_x64(True):
        yield outcome(run_of("2x2x2", 1, 2), whole=True)


def test_loss_gradients_and_state_are_those_of_one_device(stepped):
    assert stepped.metrics.applied
    compare(stepped, 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "mtp", "microbatches"), [("1x2x4", 0, 1), ("1x4x2", 1, 2)])
def test_other_meshes_give_the_same(x64, shape: str, mtp: int, microbatches: int):
    compare(outcome(run_of(shape, mtp, microbatches), whole=False), mtp, microbatches)


@pytest.mark.exhaustive
@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("mtp", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_meshes_give_the_same(x64, shape: str, mtp: int, microbatches: int):
    compare(outcome(run_of(shape, mtp, microbatches), whole=True), mtp, microbatches)


@pytest.mark.parametrize(
    "shape",
    [pytest.param(s, marks=pytest.mark.exhaustive) for s in SHAPES if s != "1x2x4"]
    + [pytest.param("1x2x4", marks=pytest.mark.slow)],
)
def test_meshes_give_the_same_in_float32(shape: str):
    """On inputs whose choice of experts no rounding can change."""
    assert margin_of(run_of("1x1x1", 1, 2, "float32")) > 1e-4
    compare(outcome(run_of(shape, 1, 2, "float32"), whole=False), 1, 2, "float32")


def margin_of(cfg: RunConfig) -> float:
    return routing_margin(cfg.model, *state_of(cfg), batch_of(cfg), cfg.train)


def test_a_bad_row_is_named_by_its_place_in_the_batch(x64, stepped):
    """And nothing of it reaches any weight."""
    cfg = run_of("2x2x2", 1, 2)
    _, state = state_of(cfg, jnp.float64)
    embed_VD = state.params["embed_VD"]
    state.params["embed_VD"] = embed_VD.replace(embed_VD[...].at[63].set(jnp.nan))
    tokens_BT, labels_BT, *_ = batch_of(cfg)
    tokens_BT, before = (tokens_BT % 63).at[11, 0].set(63), jax.tree.map(np.array, state)
    (after, metrics), _ = step_program(cfg)(state, Batch(tokens_BT, labels_BT.at[11].set(1)))
    assert not metrics.applied
    assert np.flatnonzero(~np.asarray(metrics.row_is_finite_B)).tolist() == [11]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after), before)


def test_what_devices_count_is_summed_and_the_most_is_kept():
    cfg = run_of("2x2x2", 1, 2)
    sharding = make_sharding(cfg, state_of(cfg)[1].params)

    def body():
        p = jax.lax.axis_index(TOKEN_AXES)
        return step_traffic(Traffic(*(jnp.array([p + i, 7]) for i in range(5))), sharding)

    found = jax.jit(sharding.per_device(body, (), WHOLE))()
    np.testing.assert_array_equal(found.total.received, [28, 56])
    np.testing.assert_array_equal(found.total.local_copies, [28 + 8 * 4, 56])
    np.testing.assert_array_equal(found.most_received_L, [7, 7])
    np.testing.assert_array_equal(found.most_rounds_L, [8, 7])


def test_an_entry_about_the_exchange_counts_rows_and_their_bytes():
    """Two layers, two micro-batches, 80 tokens to 2 of 16 experts each."""
    cfg = run_of("2x2x2", 1, 2, "bfloat16")
    total = Traffic(*map(np.array, ([160, 160], [32, 16], [40, 20], [50, 30], [100, 60])))
    traffic = StepTraffic(total, np.array([30, 50]), np.array([6, 2]))
    entry = exchange_entry(cfg, ROWS_OF_A_STEP, traffic)
    assert entry == {
        "device_imbalance": (30 / 20 + 50 / 20) / 2,
        "rounds": (32 + 16) / 2 / 8 / 2,
        "most_rounds": 6 / 2,
        "crossing_share": 60 / 160,
        "crossings_per_token": 80 / 160,
        "node_bytes": 80 * 4 * 32 * 2,
        "local_bytes": 160 * 4 * 32 * 2,
    }
    fp8 = replace(cfg, quant=QuantConfig("fp8"))
    assert bytes_of_row(fp8) == 2 * (32 + 1) + 2 * 32 * 2


def test_every_device_has_the_same_biases(stepped):
    for bias in jax.tree.leaves(stepped.state.biases):
        shards = [np.asarray(shard.data) for shard in bias.addressable_shards]
        assert len(shards) == 8
        assert all((shard == shards[0]).all() for shard in shards)
        assert np.abs(shards[0]).max() > 0


def test_masters_and_moments_take_an_eighth_of_their_bytes_on_each_device(stepped):
    state = stepped.state
    trees = state.params, tree_get(state.optimizer, "mu"), tree_get(state.optimizer, "nu")
    for tree in trees:
        total, whole, on_device = 0, 0, np.zeros(8)
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            total += x.nbytes
            if "norm" in parameter_name(path):
                whole += x.nbytes
            for shard in x.addressable_shards:
                on_device[shard.device.id] += shard.data.nbytes
        assert (on_device == (total - whole) / 8 + whole).all()


def test_metrics_tell_of_the_exchange(stepped):
    cfg, metrics = run_of("2x2x2", 1, 2), stepped.metrics
    entry = exchange_entry(cfg, ROWS_OF_A_STEP, jax.device_get(metrics.traffic))
    tokens = ROWS_OF_A_STEP * T
    assert metrics.traffic.total.received.tolist() == [tokens * cfg.model.experts_per_token]
    assert 1 <= entry["device_imbalance"] <= 8
    assert entry["rounds"] >= 1
    assert entry["most_rounds"] >= entry["rounds"]
    assert 0 < entry["crossing_share"] <= 1
    of_a_ramp = exchange_entry(cfg, ROWS_OF_A_STEP // 2, jax.device_get(metrics.traffic))
    assert of_a_ramp["rounds"] == 2 * entry["rounds"]  # in half as many micro-batches
    crossings = int(metrics.traffic.total.crossings.sum())
    # Input there, result back, and the same for gradients: four rows of 32 numbers of 8 bytes.
    assert bytes_of_row(cfg) == 4 * 32 * 8
    assert entry["node_bytes"] == crossings * 4 * 32 * 8
    assert crossings <= tokens * cfg.model.num_kept_groups


def test_specs_spread_the_largest_dimension_and_leave_gains_whole():
    cfg = run_of("2x2x2", 1, 1)
    _, state = state_of(cfg)
    specs = make_sharding(cfg, state.params).specs
    assert specs["embed_VD"] == P(("data", "node", "local"), None)
    assert specs["mtp.0.block.moe.w_gate_EDF"] == P(("node", "local"), "data", None)
    assert specs["mtp.0.block.moe.router.w_DE"] == P(("data", "node", "local"), None)
    assert specs["dense_layers.ffn_norm_D"] == P(None, None)
