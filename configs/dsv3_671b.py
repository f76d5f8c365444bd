"""DeepSeek-V3's pre-training: 671B parameters, 14.8T tokens (report 4.2).

    python -m dsv3_jax.train --config configs/dsv3_671b.py --print-config
    python -m dsv3_jax.train --config configs/dsv3_671b.py --print-schedule schedule.png
    python -m dsv3_jax.plan --config configs/dsv3_671b.py --compile

Hardware: the report's job is 2048 H800 for 54 days, 16 pipeline ranks of two groups of 8 nodes
(3.2), which is the mesh below; with the report's recomputation (3.2.3) and no more, a device's
programs hold 74 GB between operations (`--compile` shows it). The shape of the batch ramp and the
rate of split tokens are unpublished: eight stairs of 1,536 rows, each over the same number of
tokens, and one token in ten are our choice. Linears are in FP8 (3.3). The decay of the report's
averaged weights (3.2.3) is unpublished too: `--optimizer.ema-decay` switches them on.
"""

from dsv3_jax.config import (
    DataConfig,
    MeshConfig,
    OutputConfig,
    Phase,
    PipelineConfig,
    QuantConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from dsv3_jax.config.presets import dsv3_671b

T = 10**12  # tokens
FIRST_ROWS, ROWS, LENGTH = 3072, 15360, 4096
RAMP, STAIRS = 469 * 10**9, 8  # tokens; stairs before the full batch
STEPS = 244_829  # 17,044 of them on the stairs; the last one passes 14.8T tokens


def config() -> RunConfig:
    return RunConfig(
        model=dsv3_671b(),
        data=DataConfig(length=LENGTH, fim_rate=0.1, split_rate=0.1),
        train=TrainConfig(steps=STEPS, rows=ROWS, microbatches=120, remat="report"),
        schedule=ScheduleConfig(
            learning_rate=2.2e-4,
            warmup_steps=2000,
            learning_rate_phases=(
                Phase(0, 10 * T, 2.2e-4),
                Phase(10 * T, 14 * T + 300 * 10**9, 2.2e-5, "cosine"),
                Phase(14 * T + 300 * 10**9, 14 * T + 633 * 10**9, 2.2e-5),
                Phase(14 * T + 633 * 10**9, 14 * T + 800 * 10**9, 7.3e-6),
            ),
            bias_speed_phases=(
                Phase(0, 14 * T + 300 * 10**9, 1e-3),
                Phase(14 * T + 300 * 10**9, 14 * T + 800 * 10**9, 0.0),
            ),
            mtp_weight_phases=(
                Phase(0, 10 * T, 0.3),
                Phase(10 * T, 14 * T + 800 * 10**9, 0.1),
            ),
            rows_phases=tuple(
                Phase(RAMP * i // STAIRS, RAMP * (i + 1) // STAIRS, rows)
                for i, rows in enumerate(range(FIRST_ROWS, ROWS, (ROWS - FIRST_ROWS) // STAIRS))
            ),
        ),
        quant=QuantConfig("fp8"),
        mesh=MeshConfig(pipe=16, data=2, node=8, local=8),
        pipeline=PipelineConfig("dualpipe"),
        output=OutputConfig(name="dsv3_671b", eval_every=1000, save_every=500),
    )
