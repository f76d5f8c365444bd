"""`python -m dsv3_jax.train`: train a model; no arguments train the tiny one on the standard
library's source code.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from dsv3_jax.cli import parse, run, user_errors
from dsv3_jax.config import RunConfig
from dsv3_jax.config.load import load_config, load_json
from dsv3_jax.config.presets import tiny_run
from dsv3_jax.train.folder import RunFolder, find_run

PROG = "python -m dsv3_jax.train"
DESCRIPTION = """Train a DeepSeek-V3-shaped model.

Without options: 7.9M parameters on the source code of Python's standard library, about four
minutes on two cores. Every run gets a folder of its own: configuration, tokenizer, metrics.jsonl,
checkpoints, loss picture, sample. Ctrl-C or SIGTERM saves a checkpoint and leaves; --resume goes
on exactly where the run stood.
"""


@dataclass(frozen=True)
class Options:
    """The command's own options; the sections below are the run's configuration."""

    config: Path | None = None
    """Python file with `def config() -> RunConfig`; options below override what it returns"""
    resume: str | None = None
    """Continue a run: a run's folder or name; without a value the newest one. Its own
    configuration is the default
    """
    print_config: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the resolved configuration as JSON and leave"""
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=tiny_run)


def main(args: Sequence[str]) -> int | None:
    """The command. Returns the exit code; SystemExit 2 for the user's mistakes."""
    with user_errors():
        options, folder = resolve(_with_resume_value(list(args)))
    if options.print_config:
        print(options.run.to_json())
        return 0
    return _train(options.run, folder)


def _train(cfg: RunConfig, resume: RunFolder | None) -> int:
    from dsv3_jax.checkpoint.arrays import CheckpointError
    from dsv3_jax.train.metrics import RunConsole
    from dsv3_jax.train.run import execute, prepare  # JAX comes in here, not before --help

    console = RunConsole()
    with user_errors():
        prepared = prepare(cfg, resume, partial(console.print, soft_wrap=True))
    with user_errors((CheckpointError, OSError)):  # a full disk; other errors are faults of ours
        return execute(prepared, console)


def resolve(args: list[str]) -> tuple[Options, RunFolder | None]:
    """Options over the config file's, the resumed run's or the default configuration; and the
    folder to resume.
    """
    default = tiny_run()
    path = _value_of(args, "--config")
    if path is not None:
        default = load_config(Path(path))
    wanted = _value_of(args, "--resume")
    if wanted is None or not {"-h", "--help"}.isdisjoint(args):
        return _parse(args, default), None
    folder = find_run(Path(_value_of(args, "--output.folder") or default.output.folder), wanted)
    if path is None:
        default = load_json(folder.config)
    return _parse(args, default), folder


def _parse(args: list[str], default: RunConfig) -> Any:
    return parse(Options, Options(run=default), prog=PROG, description=DESCRIPTION, args=args)


def _value_of(args: list[str], flag: str) -> str | None:
    """A flag's value before the real parsing, which needs it to know the defaults."""
    for place, arg in enumerate(args):
        if arg == flag and place + 1 < len(args):
            return args[place + 1]
        if arg.startswith(f"{flag}="):
            return arg.partition("=")[2]
    return None


def _with_resume_value(args: list[str]) -> list[str]:
    """`--resume` alone means the newest run."""
    for place, arg in enumerate(args):
        if arg == "--resume" and (place + 1 == len(args) or args[place + 1].startswith("-")):
            return [*args[: place + 1], "newest", *args[place + 1 :]]
    return args


if __name__ == "__main__":
    run(main)
