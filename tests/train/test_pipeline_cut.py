"""Numbers of a pipelined run's arrays, and what the command refuses of its pipeline."""

from dataclasses import replace

import pytest

from dsv3_jax.checkpoint.names import StageNumbers, layer_names
from dsv3_jax.config import MeshConfig, PipelineConfig
from dsv3_jax.config.presets import tiny_run
from dsv3_jax.train.__main__ import main
from dsv3_jax.train.pipeline_cut import numbering_of
from tests.shapes import tiny_model


@pytest.mark.parametrize("leave", [[], ["--print-config"]])
def test_a_pipeline_that_cannot_be_is_refused_and_nothing_made(leave: list[str], tmp_path, capsys):
    options = "--mesh.pipe 2 --pipeline.schedule dualpipe --devices 8 --output.folder"
    with pytest.raises(SystemExit) as caught:
        main([*options.split(), str(tmp_path / "runs"), *leave])
    assert caught.value.code == 2
    assert "dualpipe on 2 ranks: micro-batches are 1" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_each_layer_keeps_its_name_whatever_the_cut():
    pipeline = PipelineConfig(stages="E+2|1+H|M")
    run, model, mesh = tiny_run(), tiny_model(), MeshConfig(pipe=3)
    data = replace(run.data, length=model.max_length)
    cfg = replace(run, model=model, data=data, mesh=mesh, pipeline=pipeline)
    numbering = numbering_of(cfg)
    assert numbering == (StageNumbers(0, 1, 0), StageNumbers(2, 2, 0), StageNumbers(3, 3, 0))
    assert layer_names((0, "dense_layers", "w"), (1, 2), numbering) == ["layers.0.w"]
    assert layer_names((0, "moe_layers", "w"), (1, 2), numbering) == ["layers.1.w"]
    assert layer_names((1, "moe_layers", "w"), (1, 2), numbering) == ["layers.2.w"]
    assert layer_names((2, "mtp", 0, "w"), (2,), numbering) == []
    assert numbering_of(replace(cfg, mesh=MeshConfig(), pipeline=PipelineConfig())) == 1
