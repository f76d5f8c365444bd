"""Whole runs with a pipeline: what they tell, and that other cuts, or none, go on from them."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.checkpoint import store
from dsv3_jax.config import MeshConfig, PipelineConfig, RunConfig
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.schedules import make
from dsv3_jax.plan.cuts import cuts_of
from dsv3_jax.train import ema
from dsv3_jax.train.metrics import read_metrics
from dsv3_jax.train.pipeline_layout import Layout
from dsv3_jax.train.pipeline_page import timeline_of
from dsv3_jax.train.pipeline_state import from_whole, to_whole
from dsv3_jax.train.pipeline_watch import PipelineWatch
from dsv3_jax.train.snapshot import Position, Snapshot, contents, restore
from dsv3_jax.train.step import TrainState
from tests.runs import SmallRun
from tests.tolerances import FLOAT32, assert_close
from tests.train.test_mesh_runs import losses_of
from tests.train.test_sharded_step import run_of
from tests.train.test_snapshot import DATA
from tests.train.test_step import state_of

ON_FOUR = (
    *("--train.rows", 8, "--train.microbatches", 4, "--mesh.pipe", 2, "--mesh.local", 2),
    *("--pipeline.schedule", "dualpipe", "--pipeline.stages", "E+2|H+M"),
)
# schedule, pipe x node x local, cut; each once as a source and once as a goal
CHAIN = (
    ("1f1b", "1x1x1", ""),
    ("dualpipe", "2x2x2", "E+3|H+M+M"),
    ("zb1p", "4x1x2", "E+1|2|H+M|M"),
    ("dualpipev", "2x1x4", "E|2|1+H|M+M"),
    ("1f1b", "1x1x1", ""),
)


def cfg_of(schedule: str, shape: str, stages: str) -> RunConfig:
    pipe, node, local = map(int, shape.split("x"))
    cfg = run_of("1x1x1", 1, 1)
    model = replace(cfg.model, num_layers=3, mtp_depth=2, num_experts=16)
    return replace(
        cfg,
        model=model,
        mesh=MeshConfig(pipe, 1, node, local),
        pipeline=PipelineConfig(schedule, stages),
        optimizer=replace(cfg.optimizer, ema_decay=0.5),
    )


def numbers_of(cfg: RunConfig) -> TrainState:
    """A state in which no two numbers of an array are alike, in NumPy."""
    _, state = state_of(cfg, jnp.float32)
    return jax.tree.map(lambda x: np.arange(x.size, dtype=x.dtype).reshape(x.shape), state)


def placed(cfg: RunConfig, state: TrainState) -> tuple[TrainState, Layout | None]:
    if cfg.mesh.pipe == 1:
        return jax.tree.map(jnp.array, state), None
    layout = Layout(cfg, make_mesh(cfg.mesh), cuts_of(cfg))
    return from_whole(layout, state), layout


@pytest.mark.parametrize("place", range(len(CHAIN) - 1))
def test_a_checkpoint_of_any_cut_restores_into_any_other(tmp_path: Path, place: int):
    """Masters, moments, biases, average, bit for bit."""
    before, after = (cfg_of(*CHAIN[place + i]) for i in (0, 1))
    wanted = numbers_of(before)
    state, _ = placed(before, wanted)
    snapshot = Snapshot(state, Position(step=7), ema.on_host(state.params))
    store.save(tmp_path, 7, *contents(before, snapshot, DATA))
    like, layout = placed(after, jax.tree.map(np.zeros_like, wanted))
    found = restore(store.load(tmp_path), after, like)
    average = found.state._replace(params=ema.in_device_memory(found.average))
    states = [found.state, average]
    if layout:
        states = [to_whole(layout, state) for state in states]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(states[0]), jax.device_get(wanted))
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(states[1].params),
        jax.device_get(wanted.params),
    )


@pytest.mark.slow
def test_a_run_tells_of_its_pipeline_and_goes_on_without_one(small: SmallRun, tmp_path: Path):
    """Its losses, before and after, are those of one device within rounding."""
    options = ("--config", small.config, "--model.num_layers", 2, "--output.folder", tmp_path)
    more = ("--train.steps", 4, "--optimizer.ema_decay", 0.5)
    assert small.train(*options, *ON_FOUR, *more, pictures=True) == 0
    run = tmp_path / "small-001"
    (entry,) = (e for e in read_metrics(run / "metrics.jsonl") if e["kind"] == "pipeline")
    assert (entry["schedule"], entry["ranks"], entry["microbatches"]) == ("dualpipe", 2, 4)
    assert all(s > 0 for seconds in entry["seconds"].values() for s in seconds)
    assert timeline_of(entry).bubble > 0
    assert "dualpipe: 2 ranks, 4 micro-batches" in (run / "report.html").read_text()
    alone = ("--mesh.pipe", 1, "--mesh.local", 1, "--pipeline.stages", "", "--train.steps", 6)
    assert small.train("--resume", run, *alone) == 0
    rows = ("--train.rows", 8, "--train.microbatches", 4, "--optimizer.ema_decay", 0.5)
    assert small.train(*options, *rows) == 0
    found, wanted = (losses_of(tmp_path / name) for name in ("small-001", "small-002"))
    assert_close(np.array(found)[-3:], np.array(wanted)[-3:], 10 * FLOAT32)


def test_a_hanging_step_is_found_at_its_first_operation_that_has_not_ended():
    schedule = make("1f1b", 2, 2)

    class Pending:
        def __init__(self, ready: bool) -> None:
            self.ready = ready

        def is_ready(self) -> bool:
            return self.ready

        def is_deleted(self) -> bool:
            return False

    watch = PipelineWatch(schedule, measure=False)
    done, open_, later = Pending(True), Pending(False), Pending(False)
    transfer, first, _, second = schedule.orders[1][:4]
    for item, result in ((first, done), (transfer, open_), (second, later)):
        watch(1, item, result)
    assert watch.where() == "transfer between ranks 0 and 1: 0|1: activation 0 →"
    open_.ready = True
    assert watch.where() == "rank 1, stage 1, micro-batch 0: B"
    later.ready = True
    assert watch.where().startswith("around the passes")


def test_medians_are_by_rank_and_kind():
    schedule = make("gpipe", 2, 3)
    watch = PipelineWatch(schedule, measure=True)
    for operation in schedule.operations(1):
        watch(1, operation, jnp.zeros(()))
    seconds = watch.seconds()
    assert set(seconds) == {"F", "B"}
    assert seconds["F"][0] is None
    assert seconds["F"][1] > 0
