"""A run's cuts, and what is refused of its pipeline before anything is made."""

from dataclasses import replace
from pathlib import Path

import pytest

from dsv3_jax.checkpoint.names import StageNumbers, layer_names
from dsv3_jax.config import MeshConfig, Phase, PipelineConfig, RunConfig, ScheduleConfig
from dsv3_jax.config.load import load_config
from dsv3_jax.config.presets import dsv3_671b, tiny_run
from dsv3_jax.plan.cost import item_costs, train_flops_per_token
from dsv3_jax.plan.cuts import check_pipeline, cuts_of
from dsv3_jax.train.__main__ import main
from dsv3_jax.train.pipeline_cut import numbering_of
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
    with pytest.raises(ValueError) as caught:  # noqa: PT011
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


def test_the_command_says_so_and_makes_nothing(tmp_path: Path, capsys):
    options = "--mesh.pipe 2 --pipeline.schedule dualpipe --devices 8 --output.folder"
    with pytest.raises(SystemExit) as caught:
        main([*options.split(), str(tmp_path / "runs")])
    assert caught.value.code == 2
    assert "dualpipe on 2 ranks: micro-batches are 1" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_each_layer_keeps_its_name_whatever_the_cut():
    cfg = run_of("1f1b", 3, 2, "E+2|1+H|M")
    numbering = numbering_of(cfg)
    assert numbering == (StageNumbers(0, 1, 0), StageNumbers(2, 2, 0), StageNumbers(3, 3, 0))
    assert layer_names((0, "dense_layers", "w"), (1, 2), numbering) == ["layers.0.w"]
    assert layer_names((0, "moe_layers", "w"), (1, 2), numbering) == ["layers.1.w"]
    assert layer_names((1, "moe_layers", "w"), (1, 2), numbering) == ["layers.2.w"]
    assert layer_names((2, "mtp", 0, "w"), (2,), numbering) == []
    assert numbering_of(replace(cfg, mesh=MeshConfig(), pipeline=PipelineConfig())) == 1


def test_costs_of_items_add_up_to_those_of_training():
    """Three forward passes' worth; the router and MTP's projection are in both."""
    model = dsv3_671b()
    total = 3 * sum(item_costs(model, 4096)[1:])
    assert total == pytest.approx(train_flops_per_token(model, 4096), rel=2e-3)


def test_dualpipe_on_a_laptop_has_four_stages_of_like_cost():
    cfg = load_config(ROOT / "configs" / "tiny_dualpipe.py")
    check_pipeline(cfg)
    costs = item_costs(cfg.model, cfg.data.length)
    stages = [str(cut) for cut in cuts_of(cfg)]
    assert len(stages) == 4
    assert stages[0].startswith("E+")
    assert max(costs) < sum(costs) / 4
