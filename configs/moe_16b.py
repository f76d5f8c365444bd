"""The report's small ablation model (15.7B parameters, 2.4B active; 4.5, Table 4) on 1.33T
tokens, with one MTP module.

    python -m dsv3_jax.train --config configs/moe_16b.py --data.source '/path/to/text/**/*.txt' \\
        --data.tokenizer tokenizer.json

Hardware: an accelerator mesh; on one device it does not fit. Shape, batch and learning rate of this
ablation are unpublished: the shape is DeepSeek-V2-Lite's; the batch of 4608 rows, the peak rate of
4.2e-4 and one cosine to a tenth are our choice. Outcome to expect (Table 4): 0.729 bits per byte on
the Pile's test set.
"""

from dsv3_jax.config import DataConfig, OutputConfig, RunConfig, ScheduleConfig, TrainConfig
from dsv3_jax.config.presets import moe_16b

TOKENS = 1_330_000_000_000
ROWS, LENGTH = 4608, 4096


def config() -> RunConfig:
    return RunConfig(
        model=moe_16b(),
        data=DataConfig(length=LENGTH),
        train=TrainConfig(
            steps=TOKENS // (ROWS * LENGTH), rows=ROWS, microbatches=576, remat="report"
        ),
        schedule=ScheduleConfig(learning_rate=4.2e-4, final_learning_rate=4.2e-5),
        output=OutputConfig(name="moe_16b", eval_every=1000, save_every=1000),
    )
