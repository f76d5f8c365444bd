"""`python -m dsv3_jax.grpo`: reinforcement learning from rewards of a model's own answers."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from dsv3_jax import process
from dsv3_jax.cli import run, user_errors, value_of
from dsv3_jax.config.grpo import GrpoConfig, load_grpo
from dsv3_jax.config.plain_json import read_text
from dsv3_jax.config.presets import tiny_run
from dsv3_jax.parallel import gpu_flags
from dsv3_jax.posttrain.grpo import check_reinforced, reinforced_of, settings_of
from dsv3_jax.train import command
from dsv3_jax.train.command import Command
from dsv3_jax.train.folder import RunFolder

if TYPE_CHECKING:
    from dsv3_jax.posttrain.completions import Source
    from dsv3_jax.posttrain.grpo_run import Grpo
    from dsv3_jax.posttrain.rewards import Rewards

PROG = "python -m dsv3_jax.grpo"
DESCRIPTION = """Train a model on rewards of its own answers (GRPO).

--init-from is a run's folder, as sft leaves one, or a Hugging Face folder. --prompts is a file of
JSON Lines, an object a line: "prompt", or "messages" that end with a user's turn; and as far as
wished "id", "reference" (what rewards compare with), and what else rewards look at ("tests" and
"cases" for one).

Each step draws --group answers to each of --prompts-per-step prompts, by the serving engine with
the weights of that moment, rates them by the sum of all --reward, and makes those likelier that are
better than others of their group. A reward that raises, hangs or returns no number counts as
--reward-failed, and the run goes on. Code that a model writes (tests) runs in a box, or not at all
but for --unsafe-local-exec.

The rate is 1e-6 and held, MTP's loss does not count, and all else (rows' length, precision,
mesh) is as the model was trained; every option of train is here too. The run's folder holds what
one of train's holds, and grpo.json, answers/ (some of them, with rewards and reasons); --resume
goes on exactly, and convert export makes a Hugging Face folder of it.
"""


@dataclass(frozen=True)
class JudgeOptions:
    """Of rewards by a model, judge:..."""

    judge_server: str | None = None
    """Address of an OpenAI-compatible server that judges"""
    judge_model: str | None = None
    """What it calls the model"""
    judge_api_key_env: str | None = None
    """Variable of the environment that holds its key"""
    judge_principles: Path | None = None
    """A text file for judge:principles; default: those that come with this package"""

    def check(self) -> None:
        """ValueError, in the names of the options."""
        if (self.judge_server is None) != (self.judge_model is None):
            raise ValueError("--judge-server and --judge-model go together")
        if self.judge_server is None and self.judge_api_key_env is not None:
            raise ValueError("--judge-api-key-env: allowed with --judge-server alone")


@dataclass(frozen=True)
class Options(command.Options):
    """The command's own options; the sections below are the run's configuration."""

    prompts: Path | None = None
    """A file of JSON Lines; in place of --data.source"""
    unsafe_local_exec: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run generated code without a box where the system has none: it may do all that you may"""
    reward_workers: int = 2
    """Answers that a reward rates at the same time"""
    reward_seconds: float = 10.0
    """For one answer by a rule or function; tests have 60, a judge 600"""
    judge: Annotated[JudgeOptions, tyro.conf.arg(name="")] = field(default_factory=JudgeOptions)
    grpo: Annotated[GrpoConfig, tyro.conf.arg(name=""), tyro.conf.UseAppendAction] = field(
        default_factory=GrpoConfig
    )


COMMAND = Command(Options(run=reinforced_of(tiny_run())), PROG, DESCRIPTION, reinforced_of)


def main(args: Sequence[str]) -> int | None:
    """The command. Returns the exit code; SystemExit 2 for the user's mistakes."""
    args = list(args)
    with user_errors():
        options, resume, init_from = resolved(args)
        if not (resume or init_from):
            raise ValueError("--init-from is needed: the folder of a model; or --resume")
        options = _with_prompts(options, args, resume)
        check_reinforced(options.run)
        options.judge.check()
        if not options.grpo.reward:
            from dsv3_jax.posttrain.rewards import NAMES

            raise ValueError(f"--reward is missing; allowed: one or more of {NAMES}")
    rows_given = bool(resume) or value_of(args, "--train.rows") is not None
    return command.perform(options, resume, init_from, make_kind=lambda: _kind(options, rows_given))


def resolved(args: list[str]) -> tuple[Options, RunFolder | None, RunFolder | None]:
    """As `command.resolve`, a resumed run's own settings as the defaults."""
    options, resume, init_from = command.resolve(COMMAND, args)
    if resume is None:
        return options, resume, init_from
    known = load_grpo(settings_of(resume.path))
    # Rewards that are given replace those of before, and are not added to them.
    given = value_of(args, "--reward") is not None
    default = replace(known, reward=()) if given else known
    again = COMMAND._replace(options=replace(COMMAND.options, grpo=default))
    options, resume, init_from = command.resolve(again, args)
    if options.grpo.updates != known.updates:
        raise ValueError(
            f"--updates is {options.grpo.updates}, was {known.updates}; allowed with --resume: "
            f"{known.updates}, since it numbers the batches"
        )
    return options, resume, init_from


def _with_prompts(options: Options, args: list[str], resume: RunFolder | None) -> Options:
    """With --prompts as the run's source. ValueError if there is none, or two."""
    source = value_of(args, "--data.source")
    if options.prompts is None:
        if source is None and options.config is None and resume is None:
            raise ValueError("--prompts is needed: a file of JSON Lines")
        return options
    if source is not None:
        raise ValueError("--prompts and --data.source: allowed: one of them")
    data = replace(options.run.data, source=str(options.prompts))
    return replace(options, run=replace(options.run, data=data))


def _kind(options: Options, rows_given: bool) -> "Grpo":
    from dsv3_jax.posttrain.grpo_run import Grpo

    return Grpo(options.grpo, rewards_of(options), rows_given=rows_given)


def rewards_of(options: Options) -> "Rewards":
    """ValueError, one line, for what cannot be rated by."""
    from dsv3_jax.posttrain.code_runner import Runner
    from dsv3_jax.posttrain.rewards import Means, rewards

    names = [spec.partition("*")[0].partition(":")[0] for spec in options.grpo.reward]
    runner = Runner.open(unsafe_local_exec=options.unsafe_local_exec) if "tests" in names else None
    judge, file = options.judge, options.judge.judge_principles
    means = Means(
        runner=runner,
        judge=_judge(judge) if judge.judge_server else None,
        principles=file and read_text(file),
        seconds=options.reward_seconds,
        workers=options.reward_workers,
        seed=options.run.train.seed,
    )
    return rewards(options.grpo.reward, means, options.grpo.reward_failed)


def _judge(options: JudgeOptions) -> "Source":
    from dsv3_jax.posttrain.served_model import ServedModel, Server
    from dsv3_jax.posttrain.synthesis_options import Sampling

    key, name = None, options.judge_api_key_env
    if name is not None:
        key = os.environ.get(name, "").strip()
        if not (key and key.isascii() and key.isprintable()):
            raise ValueError(f"--judge-api-key-env {name}: no key there")
    server = Server(options.judge_server, options.judge_model, key)
    server.check()
    return ServedModel(server, Sampling())


if __name__ == "__main__":
    process.prepare()
    gpu_flags.apply(os.environ)
    run(main)
