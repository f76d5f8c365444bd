"""Whole runs on a mesh: what they tell, where they stop, and that any mesh goes on from any."""

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.checkpoint import store
from dsv3_jax.config import RunConfig
from dsv3_jax.train import ema
from dsv3_jax.train.metrics import read_metrics
from dsv3_jax.train.sharding import make_sharding
from dsv3_jax.train.snapshot import Position, Snapshot, contents, restore
from dsv3_jax.train.step import make_step
from tests.runs import SmallRun, spread
from tests.shapes import FAST_COMPILATION
from tests.tolerances import FLOAT32, FLOAT64, assert_close
from tests.train.test_sharded_step import batch_of, expected, run_of
from tests.train.test_snapshot import DATA
from tests.train.test_step import coefficients, state_of

ON_FOUR = ("--train.rows", 4, "--mesh.node", 2, "--mesh.local", 2)
# Every mesh once as a source and once as a goal, one device among them.
CHAIN = ("1x1x1", "1x2x4", "8x1x1", "2x2x2", "1x1x8", "1x4x2", "1x1x1")
PAIRS = list(pairwise(CHAIN))


# --- checkpoints from mesh to mesh ---------------------------------------------------------------


def snapshot_on(shape: str) -> tuple[RunConfig, Snapshot]:
    cfg = run_of(shape, 1, 1)
    cfg = replace(cfg, optimizer=replace(cfg.optimizer, ema_decay=0.5))
    _, state = state_of(cfg, jnp.float32)
    moments = jax.tree.map(lambda x: np.arange(x.size, dtype=x.dtype).reshape(x.shape), state)
    state = state._replace(optimizer=moments.optimizer)
    sharding = make_sharding(cfg, state.params)
    state = spread(state, sharding)
    return cfg, Snapshot(state, Position(step=7), ema.on_host(state.params))


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_checkpoint_of_any_mesh_restores_on_any_other(tmp_path: Path, before: str, after: str):
    cfg, snapshot = snapshot_on(before)
    wanted = jax.device_get((snapshot.state, snapshot.average))
    store.save(tmp_path, 7, *contents(cfg, snapshot, DATA))
    cfg, other = snapshot_on(after)
    sharding = make_sharding(cfg, other.state.params)
    like = spread(jax.tree.map(np.zeros_like, other.state), sharding)
    restored = restore(store.load(tmp_path), cfg, like)
    found = jax.device_get((restored.state, restored.average))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    if sharding.mesh:
        places = sharding.placements(sharding.state_specs(restored.state))
        same = jax.tree.map(lambda x, place: x.sharding == place, restored.state, places)
        assert all(jax.tree.leaves(same))


@cache
def step_on(shape: str):
    cfg = run_of(shape, 1, 1)
    graphdef, state = state_of(cfg, jnp.float64)
    sharding = make_sharding(cfg, state.params)
    arguments = sharding.placed_shapes(state), sharding.put_rows(batch_of(cfg)), NUMBERS
    return make_step(graphdef, cfg, sharding).lower(*arguments).compile(FAST_COMPILATION)


NUMBERS = coefficients(0.01, 0.003)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(*pair, marks=pytest.mark.slow if i == 1 else pytest.mark.exhaustive)
        for i, pair in enumerate(PAIRS)
    ],
)
def test_the_step_after_a_change_of_mesh_is_the_same(x64, tmp_path: Path, before, after):
    cfg = run_of(before, 1, 1)
    _, state = state_of(cfg, jnp.float64)
    sharding = make_sharding(cfg, state.params)
    state = spread(state, sharding)
    store.save(tmp_path, 7, *contents(cfg, Snapshot(state, Position(step=7)), DATA))
    cfg = run_of(after, 1, 1)
    sharding = make_sharding(cfg, state.params)
    like = spread(state_of(cfg, jnp.float64)[1], sharding)
    restored = restore(store.load(tmp_path), cfg, like).state
    stepped, _ = step_on(after)(restored, sharding.put_rows(batch_of(cfg)), NUMBERS)
    assert_close(jax.device_get(stepped), expected(1, 1, "float64", True).state, FLOAT64)


# --- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(small: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two nodes of two devices, with averaged weights."""
    runs = tmp_path_factory.mktemp("mesh")
    options = ("--output.folder", runs, "--optimizer.ema_decay", 0.5)
    assert small.train("--config", small.config, *ON_FOUR, *options, pictures=True) == 0
    return runs / "small-001"


@pytest.mark.slow
def test_a_run_tells_of_its_exchange(finished: Path):
    train = [e for e in read_metrics(finished / "metrics.jsonl") if e["kind"] == "train"]
    assert all(entry["exchange"]["rounds"] >= 1 for entry in train)
    assert "Between devices" in (finished / "report.html").read_text()
    assert json.loads((finished / "config.json").read_text())["mesh"]["node"] == 2


@pytest.mark.slow
def test_a_run_on_a_mesh_is_that_on_one_device_and_goes_on_there(
    small: SmallRun, finished: Path, tmp_path: Path
):
    one = ("--config", small.config, "--train.rows", 4, "--output.folder", tmp_path)
    assert small.train(*one, "--optimizer.ema_decay", 0.5) == 0
    found, wanted = (losses_of(run) for run in (finished, tmp_path / "small-001"))
    assert_close(np.array(found), np.array(wanted), 10 * FLOAT32)
    single = ("--mesh.node", 1, "--mesh.local", 1, "--train.steps", 8)
    assert small.train("--resume", finished, *single) == 0
    assert small.train("--resume", tmp_path / "small-001", "--train.steps", 8) == 0
    found, wanted = (losses_of(run) for run in (finished, tmp_path / "small-001"))
    assert len(found) == len(wanted) > 6
    assert_close(np.array(found), np.array(wanted), 10 * FLOAT32)


@pytest.mark.slow
def test_low_precision_and_its_health_on_a_mesh(small: SmallRun, tmp_path: Path):
    options = ("--quant.recipe", "fp8", "--train.remat", "report", "--data.isolate")
    # A dense layer, and one with experts: MTP's
    options += ("--model.num_layers", 1, "--output.folder", tmp_path)
    assert small.train("--config", small.config, *ON_FOUR, *options) == 0
    entries = read_metrics(tmp_path / "small-001" / "metrics.jsonl")
    assert [e["kind"] for e in entries if e["kind"] == "quant"]
    assert all(np.isfinite(e["main_loss"]) for e in entries if e["kind"] == "train")


def losses_of(run: Path) -> list[float]:
    """In order, of all steps logged and all validations."""
    keys = "main_loss", "mtp_loss", "grad_norm", "loss"
    told = [e for e in read_metrics(run / "metrics.jsonl") if e["kind"] in ("train", "validation")]
    return [entry[key] for entry in told for key in keys if key in entry]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mesh.data", 16, "--train.rows", 16), "mesh has 1 x 16 x 1 x 1 = 16 devices"),
        (("--mesh.local", 3, "--train.rows", 3), "model.num_experts is 8; allowed: multiples of"),
        (("--mesh.local", 2, "--train.rows", 3), "train.rows / train.microbatches is 3; allowed"),
        (("--mesh.node", 8, "--train.rows", 8), "model.num_groups is 4; allowed: multiples of"),
        (("--devices", 0), "--devices is 0; allowed: 1 to 4,096"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    small: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture, options: tuple, message: str
):
    with pytest.raises(SystemExit) as stop:
        small.train("--config", small.config, "--output.folder", tmp_path / "runs", *options)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
