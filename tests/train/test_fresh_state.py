"""A fresh state is the same on every mesh and in every cut into stages, bit for bit."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from dsv3_jax.config import MeshConfig, RunConfig
from dsv3_jax.model import fresh
from dsv3_jax.train.pipeline_state import to_whole
from dsv3_jax.train.sharding import make_sharding
from dsv3_jax.train.step import TrainState, abstract_state, init_state
from tests.train.pipelines import Case, pipeline_of
from tests.train.test_sharded_step import run_of

in_loops = pytest.param(1 << 20, marks=pytest.mark.slow, id="in loops")
alone = pytest.param(0, marks=pytest.mark.exhaustive, id="alone")


@pytest.fixture(autouse=True, params=[in_loops, alone])
def drawn(request, monkeypatch):
    monkeypatch.setattr(fresh, "LONGEST", request.param)
    monkeypatch.setattr(fresh, "SHORTEST", 256)


def on_one_device(cfg: RunConfig) -> TrainState:
    return init_state(replace(cfg, mesh=MeshConfig()))


def check(state: TrainState, expected: TrainState) -> None:
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_on_a_mesh():
    cfg = run_of("2x2x2", 1, 1, "float32")
    sharding = make_sharding(cfg, abstract_state(cfg)[1].params)
    check(init_state(cfg, sharding), on_one_device(cfg))


def test_in_stages():
    pipeline = pipeline_of(Case("dualpipe", "2x2x2", 4, dtype="float32"))
    check(to_whole(pipeline.layout, pipeline.init_state()), on_one_device(pipeline.cfg))
