"""`python -m dsv3_jax.train`: train a model; no arguments train the tiny one on the standard
library's source code.
"""

import os
from collections.abc import Sequence

from dsv3_jax import process
from dsv3_jax.cli import run, user_errors
from dsv3_jax.parallel import gpu_flags
from dsv3_jax.train import command
from dsv3_jax.train.command import Command, Options
from dsv3_jax.train.folder import RunFolder

PROG = "python -m dsv3_jax.train"
DESCRIPTION = """Train a DeepSeek-V3-shaped model.

Without options: 7.9M parameters on the source code of Python's standard library, about four
minutes on two cores. Every run gets a folder of its own: configuration, tokenizer, metrics.jsonl,
checkpoints, loss picture, sample, report.html. Ctrl-C or SIGTERM saves a checkpoint and leaves;
--resume goes on exactly where the run stood.
"""


COMMAND = Command(Options(), PROG, DESCRIPTION)


def main(args: Sequence[str]) -> int | None:
    """The command. Returns the exit code; SystemExit 2 for the user's mistakes."""
    with user_errors():
        chosen = resolve(args)
    return command.perform(*chosen)


def resolve(args: Sequence[str]) -> tuple[Options, RunFolder | None, RunFolder | None]:
    """The options, and the run to resume or to start from. Errors as of `command.resolve`."""
    return command.resolve(COMMAND, args)


if __name__ == "__main__":
    process.prepare()
    gpu_flags.apply(os.environ)
    run(main)
