"""Supervised fine-tuning as a training run: whose settings change, and to what (report 5.1).

The report gives two epochs, a cosine from 5e-6 to 1e-6 and samples isolated in packed rows. It says
nothing of routers and MTP: biases stay as they are and lambda is 0.1, both as at the end of
pre-training (4.2).
"""

from dataclasses import replace

from dsv3_jax.config import RunConfig, ScheduleConfig

EPOCHS = 2
SAMPLES = "samples.jsonl"  # what `dsv3_jax.synthesize` writes


def fine_tuning_of(base: RunConfig) -> RunConfig:
    """The default run from the weights of a run that had the configuration `base`: its model, rows,
    precision and mesh, on conversations.
    """
    data = replace(
        base.data,
        source=SAMPLES,
        weights=(),
        fim_rate=0.0,
        split_rate=0.0,
        isolate=True,
        format="messages",
        # A fine-tuned run's template is in its folder, where it is looked for.
        chat_template="",
    )
    schedule = ScheduleConfig(
        learning_rate=5e-6,
        final_learning_rate=1e-6,
        warmup_steps=0,
        bias_speed=0.0,
        mtp_weight=0.1,
    )
    output = replace(base.output, name="sft", sample_prompt="Who are you?")
    return replace(base, data=data, schedule=schedule, output=output)


def check_fine_tuning(cfg: RunConfig) -> None:
    """ValueError for a run that learns from texts."""
    if cfg.data.format != "messages":
        raise ValueError(
            f"data.format is {cfg.data.format}; allowed for fine-tuning: messages (texts are for "
            "python -m dsv3_jax.train)"
        )
