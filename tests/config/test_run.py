"""The run's sections: what is refused with which words, and the round trip through JSON."""

import json
from dataclasses import replace
from typing import get_args

import pytest

from dsv3_jax.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    ParamGroup,
    Phase,
    QuantConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from dsv3_jax.config.presets import PRESETS
from dsv3_jax.config.quant import RecipeName
from dsv3_jax.config.run import from_dict
from tests.shapes import TINY_YARN, tiny_model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DataConfig(length=1), "data.length is 1; allowed: at least 2"),
        (
            lambda: DataConfig(validation_fraction=1.0),
            "data.validation_fraction is 1.0; allowed: between 0 and 1",
        ),
        (
            lambda: DataConfig(source=""),
            "data.source is empty; allowed: 'stdlib', globs or token folders",
        ),
        (lambda: TrainConfig(steps=0), "train.steps is 0; allowed: at least 1"),
        (
            lambda: OutputConfig(folder=""),
            "output.folder is ''; allowed: a folder, such as . for this one",
        ),
        (
            lambda: TrainConfig(rows=8, microbatches=3),
            "train.microbatches is 3, which does not divide train.rows = 8",
        ),
        (
            lambda: TrainConfig(balance_weight=-0.1),
            "train.balance_weight is -0.1; allowed: 0 or more",
        ),
        (lambda: TrainConfig(seed=2**32), "train.seed is 4294967296; allowed: 0 to 2^32 - 1"),
        (lambda: OptimizerConfig(b2=1.0), "optimizer.b2 is 1.0; allowed: 0 to below 1"),
        (
            lambda: OptimizerConfig(clip_norm=0.0),
            "optimizer.clip_norm is 0.0; allowed: positive numbers",
        ),
        (
            lambda: OptimizerConfig(weight_decay=-1.0),
            "optimizer.weight_decay is -1.0; allowed: 0 or more",
        ),
        (
            lambda: OptimizerConfig(ema_decay=1.0),
            "optimizer.ema_decay is 1.0; allowed: 0 to below 1",
        ),
        (
            lambda: ScheduleConfig(learning_rate=float("nan")),
            "schedule.learning_rate is nan; allowed: finite numbers",
        ),
        (lambda: OutputConfig(save_every=0), "output.save_every is 0; allowed: at least 1"),
        (lambda: OutputConfig(keep_last=-1), "output.keep_last is -1; allowed: 0 or more"),
        (
            lambda: OutputConfig(keep_every=500),
            (
                "output.keep_every is 500 and output.keep_last 0, which keeps all; "
                "allowed: with an output.keep_last of at least 1"
            ),
        ),
        (
            lambda: OutputConfig(keep_last=1, keep_every=700, save_every=500),
            "output.keep_every is 700; allowed: multiples of output.save_every = 500",
        ),
        (lambda: OutputConfig(name="a/b"), "output.name is 'a/b'; allowed: a name without '/'"),
        (
            lambda: RunConfig(data=DataConfig(length=8192)),
            "data.length is 8192; allowed: at most model.max_length = 4096",
        ),
        (
            lambda: RunConfig(model=tiny_model(mtp_depth=3), data=DataConfig(length=3)),
            "data.length is 3; allowed: more than model.mtp_depth = 3",
        ),
        (
            lambda: RunConfig(train=TrainConfig(dtype="float16")),
            "train.dtype is 'float16'; allowed: 'float32', 'bfloat16', 'float64'",
        ),
        (
            lambda: RunConfig(model=tiny_model(d_model=32.5), data=DataConfig(length=8)),
            "model.d_model is 32.5; allowed: whole numbers",
        ),
    ],
    ids=lambda x: x[:40] if isinstance(x, str) else "",
)
def test_impossible_values_are_refused_with_field_value_and_what_is_allowed(build, message: str):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        build()
    assert str(caught.value) == message


VARIED = RunConfig(
    model=tiny_model(yarn=TINY_YARN, q_latent=None),
    data=DataConfig(source=("a/*.txt", "b.txt"), length=8),
    train=TrainConfig(steps=3, dtype="float32", remat="report"),
    optimizer=OptimizerConfig(moment_dtype="float32", groups=(ParamGroup("mla", 0.5),)),
    schedule=ScheduleConfig(learning_rate_phases=(Phase(0, 10, 1.0), Phase(10, 20, 0.5, "cosine"))),
    output=OutputConfig(name="other"),
)


@pytest.mark.parametrize(
    "cfg",
    [VARIED, *(RunConfig(preset(), DataConfig(length=1024)) for preset in PRESETS.values())],
    ids=["varied", *PRESETS],
)
def test_round_trip_through_json_is_exact(cfg: RunConfig):
    assert from_dict(RunConfig, json.loads(cfg.to_json())) == cfg


def test_missing_values_take_their_defaults():
    assert from_dict(RunConfig, {}) == RunConfig()
    assert from_dict(RunConfig, {"train": {"steps": 7}}) == replace(
        RunConfig(), train=TrainConfig(steps=7)
    )


@pytest.mark.parametrize(
    ("values", "beginning"),
    [
        ({"modle": {}}, "RunConfig has no field modle; fields: model, data, train, "),
        ({"model": {"heads": 4, "dim": 8}}, "model has no field dim, heads; fields: vocab_size, "),
        ({"model": {"yarn": {"scale": 2}}}, "model.yarn has no field scale; fields: factor, "),
        (
            {"schedule": {"rows_phases": [{"begin": 0, "end": 1, "value": 1.0, "form": "x"}]}},
            "schedule.rows_phases has no field form; fields: begin, end, value, shape",
        ),
    ],
    ids=["section", "field", "nested field", "field of a phase"],
)
def test_unknown_names_are_refused_with_the_place_and_the_known_ones(values, beginning: str):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        from_dict(RunConfig, values)
    assert str(caught.value).startswith(beginning)
    assert "\n" not in str(caught.value)


def test_a_section_that_is_no_table_is_refused():
    with pytest.raises(ValueError, match=r"^model is 5; allowed: "):
        from_dict(RunConfig, {"model": 5})


def test_configs_are_values():
    assert ModelConfig() == ModelConfig()
    assert len({tiny_model(), tiny_model(), tiny_model(d_model=64)}) == 2


def test_recipes_of_a_dtype_set_it_and_others_leave_it():
    dtypes = {
        name: RunConfig(train=TrainConfig(dtype="float64"), quant=QuantConfig(name)).train.dtype
        for name in get_args(RecipeName)
    }
    expected = dict.fromkeys(dtypes, "float64") | {"f32": "float32", "bf16": "bfloat16"}
    assert dtypes == expected


@pytest.mark.parametrize("recipe", ["fp9", "", None, 8])
def test_a_recipe_that_does_not_exist_is_refused(recipe):
    with pytest.raises(ValueError, match=r"quant.recipe is .*; allowed: 'dtype', 'f32', 'bf16'"):
        QuantConfig(recipe)
