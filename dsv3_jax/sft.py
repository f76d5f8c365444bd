"""`python -m dsv3_jax.sft`: fine-tune a model on conversations, as `train` trains on texts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from dsv3_jax import process
from dsv3_jax.cli import run, user_errors, value_of
from dsv3_jax.config.fields import check
from dsv3_jax.config.presets import tiny_run
from dsv3_jax.parallel import gpu_flags
from dsv3_jax.posttrain.sft import EPOCHS, check_fine_tuning, fine_tuning_of
from dsv3_jax.train import command
from dsv3_jax.train.command import Command

PROG = "python -m dsv3_jax.sft"
DESCRIPTION = """Fine-tune a model on conversations.

--init-from is a run's folder or a Hugging Face folder. --data.source is JSON Lines, one
conversation a line: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant",
"content": "..."}]}, with system prompts and several turns as you like; synthesize writes such a
file. The loss looks at the assistant's answers alone, each with the token that ends it. As many
samples as fit share a row, and do not see each other.

By default two epochs on a cosine from 5e-6 to 1e-6, and all else (rows, precision, mesh) as the
model was trained; every option of train is here too. --model.mtp-depth 0 leaves the MTP modules
out. The run's folder holds what one of train's holds, and the chat template; --resume goes on
exactly, and convert export makes a Hugging Face folder of it.
"""


@dataclass(frozen=True)
class Options(command.Options):
    """The command's own options; the sections below are the run's configuration."""

    epochs: int | None = None
    """Passes over the samples, in place of --train.steps; default: 2, but for --config and
    --resume, which bring their steps"""


COMMAND = Command(Options(run=fine_tuning_of(tiny_run())), PROG, DESCRIPTION, fine_tuning_of)


def main(args: Sequence[str]) -> int | None:
    """The command. Returns the exit code; SystemExit 2 for the user's mistakes."""
    with user_errors():
        options, resume, init_from = command.resolve(COMMAND, args)
        if not (resume or init_from):
            raise ValueError("--init-from is needed: the folder of a model; or --resume")
        check_fine_tuning(options.run)
        epochs = epochs_of(options, list(args))
        if epochs is not None and (options.print_config or options.print_schedule):
            raise ValueError(
                "--print-config and --print-schedule need --train.steps: how many steps epochs "
                "are is known when the samples are read"
            )
    return command.perform(options, resume, init_from, epochs)


def epochs_of(options: Options, args: list[str]) -> int | None:
    """Passes over the samples; None where a number of steps is given. ValueError for both."""
    steps = value_of(args, "--train.steps")
    if options.epochs is not None:
        check("--epochs", options.epochs, options.epochs >= 1, "1 or more")
        if steps is not None:
            raise ValueError("--epochs and --train.steps: allowed: one of them")
        return options.epochs
    has_steps = steps is not None or options.config is not None or options.resume is not None
    return None if has_steps else EPOCHS


if __name__ == "__main__":
    process.prepare()
    gpu_flags.apply(os.environ)
    run(main)
