"""Reinforcement learning in groups as a training run: whose settings change, and to what (report
5.2.2).

The report gives neither rate nor steps. The rate is DeepSeekMath's 1e-6, held; biases of routers
stay as they are, as in fine-tuning; MTP's loss does not count, since Eq. 26 speaks of the main
model alone.
"""

from dataclasses import replace
from pathlib import Path

from dsv3_jax.config import RunConfig, ScheduleConfig


def settings_of(folder: Path) -> Path:
    """Where a run's `GrpoConfig` stands."""
    return folder / "grpo.json"


def reinforced_of(base: RunConfig) -> RunConfig:
    """The default run from the weights of a run that had the configuration `base`: its model, rows,
    precision and mesh, on prompts.
    """
    data = replace(
        base.data,
        source="prompts.jsonl",
        weights=(),
        fim_rate=0.0,
        split_rate=0.0,
        isolate=True,
        format="prompts",
        chat_template="",
        too_long="drop",
    )
    schedule = ScheduleConfig(
        learning_rate=1e-6,
        final_learning_rate=1e-6,
        warmup_steps=0,
        bias_speed=0.0,
        mtp_weight=0.0,
    )
    output = replace(
        base.output,
        name="grpo",
        log_every=1,
        eval_every=10,
        save_every=50,
        keep_every=0,
        sample_tokens=0,
    )
    train = replace(base.train, steps=200, spike="off")
    return replace(base, data=data, schedule=schedule, output=output, train=train)


def check_reinforced(cfg: RunConfig) -> None:
    """ValueError for what a run on its own answers cannot be."""
    if cfg.data.format != "prompts":
        raise ValueError(f"data.format is {cfg.data.format}; allowed here: prompts")
    if not isinstance(cfg.data.source, str):
        raise ValueError("data.source has several entries; allowed here: one file of prompts")
    if cfg.train.spike != "off":
        raise ValueError(
            f"train.spike is {cfg.train.spike}; allowed here: off, since the loss of weighted "
            "labels is no measure of trouble"
        )
    if cfg.schedule.rows_phases:
        raise ValueError("schedule.rows_phases: allowed here: none, since answers fill the rows")
