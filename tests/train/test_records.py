"""What a run says of its first step: what is switched off, does not move, has no gradient."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import Phase
from dsv3_jax.train.records import warnings_of
from dsv3_jax.train.schedules import values_at
from tests.runs import SmallRun

PROMPTS = {"data": {"format": "prompts", "source": "p.jsonl", "isolate": True}}
MESSAGES = {"data": {"format": "messages", "source": "m.jsonl", "isolate": True}}
OFF = {"schedule": {"bias_speed": 0.0, "mtp_weight": 0.0}}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, []),
        ({"schedule": {"mtp_weight": 0.0}}, ["schedule.mtp_weight is 0"]),
        ({"schedule": {"bias_speed": 0.0}}, ["schedule.bias_speed is 0"]),
        ({"train": {"balance_weight": 0.0}}, ["train.balance_weight is 0"]),
        ({"schedule": {"mtp_weight": 0.0}, "model": {"mtp_depth": 0}}, []),
        (
            {"schedule": {"bias_speed_phases": (Phase(0, 192, 0.1), Phase(192, 200, 0.1))}},
            ["1 of 2 schedule.bias_speed_phases begin after the run's end at 192 tokens"],
        ),
        ({"schedule": {"bias_speed_phases": (Phase(0, 191, 0.1), Phase(191, 200, 0.1))}}, []),
        (
            {"mesh": {"node": 2}, "model": {"num_groups": 1, "num_kept_groups": 1}},
            ["routing is not limited (model.num_groups is 1): a token may go to 2 of 2 nodes"],
        ),
        ({"mesh": {"node": 2}}, []),
        ({"mesh": {"local": 2}, "model": {"num_groups": 1, "num_kept_groups": 1}}, []),
        (PROMPTS | OFF, []),
        (MESSAGES | OFF, ["schedule.mtp_weight is 0"]),
        (PROMPTS | {"train": {"balance_weight": 0.0}}, ["train.balance_weight is 0"]),
    ],
)
def test_what_is_switched_off_is_told(small: SmallRun, changes: dict, told: list[str]):
    sections = {name: replace(getattr(small.cfg, name), **c) for name, c in changes.items()}
    cfg = replace(small.cfg, **sections)
    values = values_at(cfg, 0, 0, 1)
    assert warnings_of(cfg, values, told_by(np.ones(2, bool))) == told


def told_by(moved_L: np.ndarray, squares: nnx.State | None = None) -> SimpleNamespace:
    """What a first step tells."""
    return SimpleNamespace(squared_norms=squares or nnx.State({}), bias_moved_L=moved_L)


def test_biases_that_do_not_move_are_told(small: SmallRun):
    told = warnings_of(small.cfg, values_at(small.cfg, 0, 0, 1), told_by(np.array([False, True])))
    assert told == ["the bias of 1 of 2 routers did not move"]


def test_parameters_without_a_gradient_are_named(small: SmallRun):
    values = {"a": 0.0, "b": 1e-30, "moe_layers": {"w": 0.0}}
    squares = nnx.State(jax.tree.map(lambda x: nnx.Param(np.array(x)), values))
    squares["moe_layers"]["w"] = nnx.Param(np.array([0.0, 2.0]))
    told = warnings_of(small.cfg, values_at(small.cfg, 0, 0, 1), told_by(np.ones(2, bool), squares))
    assert told == ["no gradient reaches 2 of 4 parameters: a, layers.1.w"]


def test_on_prompts_equal_rewards_are_named_as_a_reason(small: SmallRun):
    data = replace(small.cfg.data, **PROMPTS["data"])
    squares = nnx.State({"head_DV": nnx.Param(np.array(0.0)), "a": nnx.Param(np.array(1.0))})
    cfg = replace(small.cfg, data=data)
    told = warnings_of(cfg, values_at(cfg, 0, 0, 1), told_by(np.ones(2, bool), squares))
    (line,) = told
    assert line.endswith("parameters (there is none if each group's rewards are equal): head_DV")


def test_that_mtp_has_no_gradient_is_told_where_it_has_a_weight(small: SmallRun):
    squares = nnx.State({"mtp": {"0": {"w": nnx.Param(np.array(0.0))}}})
    told = []
    for weight in (0.3, 0.0):
        schedule = replace(small.cfg.schedule, mtp_weight=weight)
        cfg = replace(small.cfg, schedule=schedule)
        told += warnings_of(cfg, values_at(cfg, 0, 0, 1), told_by(np.ones(2, bool), squares))
    assert told == ["no gradient reaches 1 of 1 parameters: mtp.0.w", "schedule.mtp_weight is 0"]
