"""A step whose labels have weights, and log p of labels, are on every mesh what they are on one
device.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import DataConfig, RunConfig
from dsv3_jax.data.loader import Batch
from dsv3_jax.parallel.schedules import NAMES
from dsv3_jax.train import pipeline_run
from dsv3_jax.train.pipeline import Pipeline
from dsv3_jax.train.pipeline_run import PipelineRun
from dsv3_jax.train.pipeline_state import from_whole
from dsv3_jax.train.scoring import make_scores
from dsv3_jax.train.sharding import make_sharding
from tests.runs import spread
from tests.shapes import FAST_COMPILATION, compiled
from tests.tolerances import FLOAT64, assert_close
from tests.train import test_sharded_step as sharded
from tests.train import test_shared_rows as shared
from tests.train.pipelines import Case, batch_of, state_for
from tests.train.test_pipeline_step import check
from tests.train.test_step import state_of

MESHES = [
    ("1x2x2", "none"),
    ("2x1x2", "none"),
    ("2x1x2", "local"),
    ("1x2x4", "node_local"),
    ("2x2x2", "local"),
]


def run_of(shape: str, sequence: str) -> RunConfig:
    cfg = shared.run_of(shape, sequence)
    return replace(cfg, data=DataConfig(length=shared.T, format="prompts", isolate=True))


def weighted(cfg: RunConfig) -> Batch:
    batch = shared.batch_of(cfg)
    weights = np.random.default_rng(3).standard_normal(batch.labels_BT.shape)
    return batch._replace(weights_BT=jnp.asarray(weights))


@pytest.fixture
def weighted_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "batch_of", weighted)


def check_mesh(shape: str, sequence: str) -> None:
    found, plain = (
        sharded.outcome(run_of(*of), whole=True) for of in ((shape, sequence), ("1x1x1", "none"))
    )
    found = found._replace(metrics=found.metrics._replace(traffic=None))
    assert found.metrics.applied
    assert_close(*map(jax.device_get, (found, plain)), FLOAT64)


@pytest.mark.slow
def test_a_weighted_step_is_that_of_one_device(x64, weighted_batches):
    check_mesh(*MESHES[2])


@pytest.mark.exhaustive
@pytest.mark.parametrize(("shape", "sequence"), MESHES)
def test_all_meshes_weigh_alike(x64, weighted_batches, shape: str, sequence: str):
    check_mesh(shape, sequence)


PIPELINES = [
    *(
        Case(name, "2x1x1", 4 if name == "dualpipe" else 5, layers=2, weighted=True)
        for name in NAMES
    ),
    Case("dualpipe", "2x1x2", 4, "E+1|H+M", layers=1, length=16, sequence="local", weighted=True),
    Case("zb1p", "2x2x1", 3, "E+1|H+M", layers=1, data=2, tied=True, weighted=True),
    Case("dualpipe", "2x1x1", 4, rows=2, dtype="float32", recipe="fp8", weighted=True),
]


@pytest.mark.timeout(3600)  # where all compile at the same time
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case, marks=pytest.mark.slow if case.schedule == "1f1b" else pytest.mark.exhaustive
        )
        for case in PIPELINES
    ],
    ids=str,
)
def test_pipelines_weigh_alike(case: Case):
    check(case)


# --- log p of labels -----------------------------------------------------------------------------


def expected_scores(cfg: RunConfig, batch: Batch, dtype: str = "float64") -> np.ndarray:
    """By the whole model on one device, logits and all."""
    graphdef, state = state_of(cfg, jnp.dtype(dtype))

    @compiled
    def run(batch: Batch) -> jax.Array:
        model = nnx.merge(graphdef, state.params, state.biases)
        h_BTD, _ = model.hidden(
            batch.tokens_BT, batch.labels_BT >= 0, jnp.float64, segments_BT=batch.segments_BT
        )
        log_p_BTV = jax.nn.log_softmax(model.logits(h_BTD))
        labels_BT = batch.labels_BT
        found_BT = jnp.take_along_axis(log_p_BTV, jnp.maximum(labels_BT, 0)[..., None], -1)[..., 0]
        return jnp.where(labels_BT >= 0, found_BT, 0)

    return np.asarray(run(jax.tree.map(jnp.asarray, batch._replace(weights_BT=None))))


def scored(cfg: RunConfig, batch: Batch) -> np.ndarray:
    graphdef, state = state_of(cfg, jnp.float64)
    sharding = make_sharding(cfg, state.params)
    state = spread(state, sharding)
    return make_scores(graphdef, cfg, sharding)(state, jax.tree.map(np.asarray, batch))


def check_scores(shape: str, sequence: str) -> None:
    cfg = run_of(shape, sequence)
    batch = weighted(cfg)
    found = scored(cfg, batch)
    assert not found[np.asarray(batch.labels_BT) < 0].any()
    assert_close(found, expected_scores(run_of("1x1x1", "none"), batch), FLOAT64)


def test_scores_are_the_models_log_probabilities(x64):
    """In two micro-batches, of isolated rows; devices share their rows."""
    check_scores("2x1x2", "local")


@pytest.mark.exhaustive
@pytest.mark.parametrize(("shape", "sequence"), [("1x1x1", "none"), *MESHES])
def test_all_meshes_score_alike(x64, shape: str, sequence: str):
    check_scores(shape, sequence)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            Case(
                "1f1b", "2x1x2", 2, "E+1|H+M", layers=1, length=16, sequence="local", weighted=True
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Case("dualpipev", "2x2x1", 4, "E|2|H|M", layers=2, data=2, weighted=True),
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            Case("dualpipe", "2x1x1", 4, tied=True, weighted=True), marks=pytest.mark.exhaustive
        ),
    ],
    ids=str,
)
def test_a_pipeline_scores_alike(x64, monkeypatch: pytest.MonkeyPatch, case: Case):
    batch, (_, state) = batch_of(case), state_for(case)
    state = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, state)
    monkeypatch.setattr(pipeline_run, "Pipeline", partial(Pipeline, options=FAST_COMPILATION))
    run = PipelineRun(case.config)
    found = run.make_scores()(from_whole(run.layout, jax.device_get(state)), batch)
    assert_close(found, expected_scores(case.plain.config, batch, "float32"), FLOAT64)
