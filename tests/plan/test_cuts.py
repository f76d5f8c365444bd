"""A run's cuts, and what is refused of its pipeline before anything is made."""

from dataclasses import replace
from pathlib import Path

import pytest

from dsv3_jax.config import MeshConfig, Phase, PipelineConfig, RunConfig, ScheduleConfig
from dsv3_jax.config.load import load_config
from dsv3_jax.config.presets import tiny_run
from dsv3_jax.plan.cost import item_costs
from dsv3_jax.plan.cuts import check_pipeline, cuts_of
from tests.shapes import tiny_model

ROOT = Path(__file__).parents[2]


def run_of(schedule: str, pipe: int, microbatches: int, stages: str = "") -> RunConfig:
    run = tiny_run()
    return replace(
        run,
        model=tiny_model(),
        data=replace(run.data, length=16),
        mesh=MeshConfig(pipe=pipe),
        pipeline=PipelineConfig(schedule, stages),
        train=replace(run.train, rows=microbatches, microbatches=microbatches),
    )


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (
            run_of("dualpipe", 2, 3),
            (
                "pipeline.schedule, with train.microbatches: dualpipe on 2 ranks: micro-batches "
                "are 3; allowed: even, 4 or more"
            ),
        ),
        (
            run_of("dualpipe", 3, 8),
            (
                "pipeline.schedule, with train.microbatches: dualpipe: ranks are 3; allowed: even, "
                "2 or more"
            ),
        ),
        (
            run_of("1f1b", 7, 8),
            (
                "pipeline.stages: the model has 6 items to cut (embedding, 3 layers, head, 1 MTP "
                "modules); allowed: at most as many stages, and 7 are asked for"
            ),
        ),
        (
            run_of("1f1b", 2, 2, "E+2|H+M"),
            "pipeline.stages: 'E+2|H+M' is no cut of this model; allowed: cuts of E+3+H+M",
        ),
        (
            run_of("1f1b", 1, 2, "E+3+H+M"),
            "pipeline.stages is 'E+3+H+M' with mesh.pipe 1; allowed: empty",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(cfg: RunConfig, message: str):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        check_pipeline(cfg)
    assert str(caught.value) == message


def test_a_ramp_may_begin_below_what_its_schedule_needs():
    cfg = run_of("dualpipe", 2, 4)
    ramp = (Phase(0, 64, 1.0), Phase(64, 640, 4.0))
    schedule = ScheduleConfig(rows_phases=ramp)
    check_pipeline(replace(cfg, schedule=schedule))
    v = replace(cfg, pipeline=PipelineConfig("dualpipev"), schedule=schedule)
    with pytest.raises(ValueError, match="micro-batches are 1; allowed: 4 or more"):
        check_pipeline(v)


def test_dualpipe_on_a_laptop_has_four_stages_of_like_cost():
    cfg = load_config(ROOT / "configs" / "tiny_dualpipe.py")
    check_pipeline(cfg)
    costs = item_costs(cfg.model, cfg.data.length)
    stages = [str(cut) for cut in cuts_of(cfg)]
    assert len(stages) == 4
    assert stages[0].startswith("E+")
    assert max(costs) < sum(costs) / 4
