"""The step on devices that share their rows is the step on one device: loss, every gradient, every
weight and moment, router biases; and its memory.

In float64, where a missing or doubled term is far above rounding. One device is the oracle.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import DataConfig, RunConfig
from dsv3_jax.data.loader import Batch
from dsv3_jax.model import blockwise, transformer
from dsv3_jax.train.metrics import read_metrics
from dsv3_jax.train.sharding import make_sharding
from dsv3_jax.train.step import Coefficients, abstract_state, make_step
from tests.runs import SmallRun
from tests.shapes import random_tokens
from tests.tolerances import FLOAT32, FLOAT64, assert_close
from tests.train import test_sharded_step as sharded
from tests.train.pipelines import Case
from tests.train.test_pipeline_step import check

T, ROWS_OF_A_STEP = 16, 4
# data x node x local, and the devices that share a row: 2, 4 and 8 of them.
MESHES = [
    (shape, sequence)
    for shape in ("2x1x2", "2x2x2", "1x2x4", "1x1x8", "2x1x4")
    for sequence in ("local", "node_local")
    if not (sequence == "node_local" and shape.split("x")[1] == "1")
]


def run_of(
    shape: str,
    sequence: str,
    *,
    isolate: bool = True,
    remat: str = "none",
    dtype: str = "float64",
) -> RunConfig:
    cfg = sharded.run_of(shape, 1, 1, dtype)
    mesh = replace(cfg.mesh, sequence=sequence)
    count = 2 if mesh.row_groups <= 2 else 1
    train = replace(cfg.train, rows=ROWS_OF_A_STEP, microbatches=count, remat=remat)
    return replace(cfg, data=DataConfig(length=T, isolate=isolate), train=train, mesh=mesh)


def batch_of(cfg: RunConfig) -> Batch:
    """Rows have 4 to 16 labels that count and, if isolated, some three segments."""
    sequence = random_tokens(cfg.model, ROWS_OF_A_STEP, T + 1)
    draw = np.random.default_rng(0)
    lengths_B1 = draw.integers(4, T + 1, (ROWS_OF_A_STEP, 1))
    labels_BT = np.where(np.arange(T)[None] < lengths_B1, sequence[:, 1:], -1)
    if not cfg.data.isolate:
        return Batch(sequence[:, :-1], jnp.asarray(labels_BT))
    starts_BT = draw.random((ROWS_OF_A_STEP, T)) < 0.2
    segments_BT = np.cumsum(starts_BT, 1, dtype=np.int32)
    labels_BT[:, :-1][segments_BT[:, 1:] != segments_BT[:, :-1]] = -1
    return Batch(sequence[:, :-1], jnp.asarray(labels_BT), jnp.asarray(segments_BT))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "BLOCK", 2)
    monkeypatch.setattr(sharded, "batch_of", batch_of)


@cache
def one_device(isolate: bool, dtype: str) -> sharded.Outcome:
    cfg = run_of("1x1x1", "none", isolate=isolate, dtype=dtype)
    return jax.device_get(sharded.outcome(cfg, whole=True))


def compare(cfg: RunConfig, tolerance: float = FLOAT64) -> None:
    found = sharded.outcome(cfg, whole=True)
    found = found._replace(metrics=found.metrics._replace(traffic=None))
    expected = one_device(cfg.data.isolate, cfg.train.dtype)
    if tolerance == FLOAT32:  # Adam's division makes of a small gradient's rounding a large one's
        found, expected = (
            x._replace(state=x.state.biases, metrics=None) for x in (found, expected)
        )
    assert_close(jax.device_get(found), expected, tolerance)


def test_all_is_as_on_one_device(x64):
    """Two groups of two devices; packed rows, isolated, with MTP, in two micro-batches."""
    compare(run_of("2x1x2", "local"))


def test_a_bad_row_is_named_by_its_place_in_the_batch(x64):
    """And nothing of it reaches any weight."""
    cfg = run_of("2x1x2", "local")
    _, state = sharded.state_of(cfg, jnp.float64)
    embed_VD = state.params["embed_VD"]
    state.params["embed_VD"] = embed_VD.replace(embed_VD[...].at[63].set(jnp.nan))
    batch = batch_of(cfg)
    tokens_BT = (batch.tokens_BT % 63).at[2, T - 1].set(63)
    before = jax.tree.map(np.array, state)
    (after, metrics), _ = sharded.step_program(cfg)(state, batch._replace(tokens_BT=tokens_BT))
    assert not metrics.applied
    assert np.flatnonzero(~np.asarray(metrics.row_is_finite_B)).tolist() == [2]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after), before)


@pytest.mark.slow
def test_rows_over_nodes_are_as_on_one_device(x64):
    compare(run_of("1x2x4", "node_local", remat="report"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("remat", ["none", "report", "full"])
@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize(("shape", "sequence"), MESHES)
def test_all_meshes_are_as_one_device(x64, shape, sequence, isolate, remat):
    compare(run_of(shape, sequence, isolate=isolate, remat=remat))


@pytest.mark.exhaustive
@pytest.mark.parametrize(("shape", "sequence"), MESHES)
def test_it_is_the_same_in_float32(shape, sequence):
    """On inputs whose choice of experts no rounding can change."""
    alone = replace(run_of("1x1x1", "none", dtype="float32").train, microbatches=1)
    cfg = replace(run_of("1x1x1", "none", dtype="float32"), train=alone)
    assert sharded.margin_of(cfg) > 1e-4
    compare(run_of(shape, sequence, dtype="float32"), FLOAT32)


def test_a_row_is_bad_if_any_part_of_it_is():
    """Rows 0 to 3 on two groups of two devices: of row 1 the late, of row 2 the early device's."""
    cfg = run_of("2x1x2", "local", dtype="float32")
    sharding = make_sharding(cfg, abstract_state(cfg)[1].params)

    def body() -> jax.Array:
        group, device = jax.lax.axis_index("data"), jax.lax.axis_index("local")
        bad = jnp.stack([(group == 1) & (device == 0), (group == 0) & (device == 1)])
        return sharding.of_rows(~bad)

    found = jax.jit(sharding.per_device(body, (), sharding.row_spec))()
    assert found.tolist() == [True, False, False, True]


PIPELINES = [
    Case("dualpipe", "2x1x2", 4, "E+1|H+M", 1, isolate=True, length=T, sequence="local"),
    Case("zb1p", "2x2x2", 3, "E+1|H+M", 1, remat="report", length=T, sequence="node_local"),
    Case("1f1b", "2x1x2", 3, "E+1|H+M", 1, data=2, rows=2, length=T, sequence="local"),
    Case("dualpipev", "2x1x4", 5, layers=2, isolate=True, length=T, sequence="local"),
]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.exhaustive if i else pytest.mark.slow)
        for i, case in enumerate(PIPELINES)
    ],
    ids=str,
)
def test_pipelines_share_rows_too(case: Case):
    check(case)


# --- memory --------------------------------------------------------------------------------------


def temporary_bytes(shards: int, part: int) -> int:
    """Of a step's program on one device, with one row of `part` tokens a device."""
    cfg = run_of(f"1x1x{shards}", "local", isolate=False, dtype="float32", remat="report")
    shape = {"num_layers": 2, "num_dense_layers": 2, "mtp_depth": 0}
    model = replace(cfg.model, kv_latent=124, max_length=2**16, **shape)
    data, train = DataConfig(length=shards * part), replace(cfg.train, rows=1, microbatches=1)
    cfg = replace(cfg, model=model, data=data, train=train)
    graphdef, state = abstract_state(cfg)
    sharding = make_sharding(cfg, state.params)
    place = sharding.row_placement
    tokens = jax.ShapeDtypeStruct((shards, part), jnp.int32, sharding=place)
    numbers = Coefficients(*[jax.ShapeDtypeStruct((), jnp.float32)] * 4)
    step = make_step(graphdef, cfg, sharding)
    step = step.lower(sharding.placed_shapes(state), Batch(tokens, tokens), numbers).compile()
    return step.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_of_a_longer_row_a_device_holds_more_latents_and_nothing_else(monkeypatch):
    """With as many tokens on each device. Gathered latents, their gradients, and these once more
    on their way back to their owners, at one time, of one layer: three float32 numbers for each of
    the latents' C + R. Of a token of the row that is all but for ids, labels and the like.
    Expanded to keys and values per head it would be 28 numbers for each.
    """
    monkeypatch.setattr(transformer, "UNROLLED", 0)  # XLA:CPU would gather for all layers at once
    monkeypatch.setattr(blockwise, "BLOCK", 64)
    few, many = (temporary_bytes(shards, 512) for shards in (2, 4))
    latents = 4 * (124 + 4)
    assert many - few <= (4 - 2) * 512 * (3 * latents + 64)


# --- whole runs ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_with_shared_rows_is_that_on_one_device_and_goes_on_there(
    small: SmallRun, tmp_path: Path
):
    """Losses of steps and validations; one has its last steps on one device."""
    folders = [tmp_path / name for name in ("shared", "alone")]
    shared = ("--mesh.local", 2, "--mesh.sequence", "local", "--train.steps", 4)
    for folder, mesh in zip(folders, (shared, ()), strict=True):
        assert small.train("--config", small.config, *mesh, "--output.folder", folder) == 0
    runs = [folder / "small-001" for folder in folders]
    alone = ("--mesh.local", 1, "--mesh.sequence", "none", "--train.steps", 6)
    assert small.train("--resume", runs[0], *alone) == 0
    found, wanted = map(losses_by_step, runs)
    assert {("train", 6), ("validation", 6)} <= found.keys() & wanted.keys()
    both = sorted(found.keys() & wanted.keys())
    assert len(both) >= 4
    assert_close(*(np.array([of[key] for key in both]) for of in (found, wanted)), 10 * FLOAT32)


def losses_by_step(run: Path) -> dict[tuple[str, int], float]:
    entries = read_metrics(run / "metrics.jsonl")
    keys = {"train": "main_loss", "validation": "loss"}
    return {(e["kind"], e["step"]): e[keys[e["kind"]]] for e in entries if e["kind"] in keys}
