"""DeepSeek-V3's pre-training: 671B parameters, 14.8T tokens (report 4.2).

    python -m dsv3_jax.train --config configs/dsv3_671b.py --print-config

Hardware: the report's job is 2048 H800 for 54 days; on one device it does not fit. The batch is
the report's after its ramp, 15360 rows;
the bias speed (0 for the last 500B tokens) and the MTP weight (0.1 after 10T) do not change yet.
"""

from dsv3_jax.config import DataConfig, OutputConfig, Phase, RunConfig, ScheduleConfig, TrainConfig
from dsv3_jax.config.presets import dsv3_671b

TOKENS = 14_800_000_000_000
ROWS, LENGTH = 15360, 4096


def config() -> RunConfig:
    return RunConfig(
        model=dsv3_671b(),
        data=DataConfig(length=LENGTH),
        train=TrainConfig(
            steps=TOKENS // (ROWS * LENGTH), rows=ROWS, microbatches=120, remat="report"
        ),
        schedule=ScheduleConfig(
            learning_rate=2.2e-4,
            warmup_steps=2000,
            phases=(
                Phase(10_000_000_000_000, 2.2e-4),
                Phase(4_300_000_000_000, 2.2e-5, "cosine"),
                Phase(333_000_000_000, 2.2e-5),
                Phase(167_000_000_000, 7.3e-6),
            ),
        ),
        output=OutputConfig(name="dsv3_671b", eval_every=1000, save_every=500),
    )
