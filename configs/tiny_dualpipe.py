"""DualPipe on a laptop: four pipeline ranks of two devices each, FP8, MTP.

    python -m dsv3_jax.train --config configs/tiny_dualpipe.py --devices 8

Hardware: two CPU cores, 8 GB; minutes of compilation the first time; figures: README, "Pipelines".
As many tokens as the default run sees, in half as many steps of twice the rows: DualPipe on four
ranks needs eight micro-batches, and each device a row of each.
"""

from dataclasses import replace

from dsv3_jax.config import MeshConfig, PipelineConfig, QuantConfig, RunConfig
from dsv3_jax.config.presets import tiny_run


def config() -> RunConfig:
    run = tiny_run()
    return replace(
        run,
        quant=QuantConfig("fp8"),
        mesh=MeshConfig(pipe=4, local=2, bucket_factor=2.0),
        pipeline=PipelineConfig("dualpipe"),
        train=replace(run.train, steps=200, rows=16, microbatches=8),
        schedule=replace(run.schedule, warmup_steps=15),
        output=replace(run.output, name="tiny_dualpipe", eval_every=50, save_every=100),
    )
