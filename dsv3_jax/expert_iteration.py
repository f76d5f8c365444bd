"""`python -m dsv3_jax.expert_iteration`: a model that learns from its own verified answers."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dsv3_jax import process, sft
from dsv3_jax.cli import clean_on_signals, parse, run, to_stderr, user_errors
from dsv3_jax.config.fields import check
from dsv3_jax.inference.options import EngineOptions
from dsv3_jax.posttrain.iteration_options import Keeping
from dsv3_jax.posttrain.setting_files import text_of
from dsv3_jax.posttrain.sft import check_fine_tuning
from dsv3_jax.posttrain.synthesis_options import Sampling
from dsv3_jax.train import command
from dsv3_jax.train.folder import run_at

if TYPE_CHECKING:
    from dsv3_jax.posttrain.completions import Source
    from dsv3_jax.posttrain.iteration_plan import Plan

PROG = "python -m dsv3_jax.expert_iteration"
DESCRIPTION = """Attempt statements, keep what is verified, fine-tune on it, and again.

--statements is a file of JSON Lines, an object a line: "prompt", or "messages" that end with a
user's turn; "reference", which verifiers compare with (of proof, the statement itself: p, p -> q
|- q); and if wished "id" and "kind". A line whose id is "not X" is the negation of line X: both
are attempted until one of them is settled.

--verifier takes proof (natural deduction), exact, boxed, regex, regex:PATTERN, json,
json:KEY,KEY, words:LEAST-MOST or python:module:function (of an attempt, with text, reference and
so on; returns a bool, or a pair of bool and reason), behind KIND= for one kind alone; all must
accept an answer. Each works in a process of its own, and rejects what it hangs on.

--out holds samples.jsonl, the data set with where each sample comes from; report.md, report.json
and pass_rates.png; and a folder for each round, with its attempts and its model. Stopped at any
moment, the same command goes on where it was; with more --rounds it goes on from the last one.

Options of sft stand behind a -- of their own: -- --epochs 3 --schedule.learning-rate 1e-4
"""
_QUIET_SECONDS = 10.0  # between two lines of progress
# Of sft's options those that are this command's business.
_TAKEN = ("--init-from", "--resume", "--data.source", "--data.chat-template", "--output.folder")
_TAKEN += ("--output.name", "--print-config", "--print-schedule", "--devices", "--profile")


@dataclass(frozen=True)
class Options:
    """The command's options."""

    statements: Path
    """A file of JSON Lines"""
    out: Path
    """A new folder, or one in which this command was stopped"""
    checkpoint: Path
    """The model to begin with: a run's folder, or a Hugging Face folder"""
    verifier: tuple[str, ...] = ()
    """Judges of answers; one or more"""
    verifier_seconds: float = 10.0
    """That a verifier has for an answer"""
    held_out: Path | None = None
    """Statements that are attempted by every model and never learned"""
    samples: Path | None = None
    """Conversations that every fine-tuning reads too"""
    rounds: int = 3
    """Of attempts and fine-tuning"""
    attempts: int = 8
    """At each statement in each round"""
    ask: Literal["all", "unsettled"] = "all"
    """Statements of a round: all, or those without an accepted attempt"""
    tune_from: Literal["base", "last"] = "base"
    """The model that a round fine-tunes: --checkpoint, or that of the round before"""
    kind: str = "reasoning_original"
    """Of lines that name none"""
    templates: Path | None = None
    """A JSON file of own templates: {"writing": {"system": "...", "user": "{{ prompt }}"}}"""
    decontaminate: tuple[Path, ...] = ()
    """Evaluation sets, .jsonl or plain text, that no sample may show"""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of weights that make attempts; default: bfloat16 for a run, as stored for a Hugging Face
    folder"""
    chat_template: Path | None = None
    """A Jinja file; default: that of --checkpoint, else DeepSeek's"""
    seed: int = 0
    """Of what is drawn"""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    keeping: Annotated[Keeping, tyro.conf.arg(name="")] = field(default_factory=Keeping)
    engine: Annotated[EngineOptions, tyro.conf.arg(name="")] = field(default_factory=EngineOptions)

    def check(self) -> None:
        """ValueError, in the names of the options."""
        if not self.verifier:
            raise ValueError("--verifier is missing; allowed: one or more, such as proof")
        seconds = self.verifier_seconds
        check("--verifier-seconds", seconds, 0 < seconds < 1e6, "above 0, below 1e6")
        check("--rounds", self.rounds, 1 <= self.rounds <= 999, "1 to 999")
        check("--attempts", self.attempts, 1 <= self.attempts <= 10**6, "1 to 1,000,000")
        check("--seed", self.seed, 0 <= self.seed < 2**63, "0 to 2^63 - 1")
        if self.sampling.temperature == 0:
            most = "1, since all are the same at --temperature 0"
            check("--attempts", self.attempts, self.attempts == 1, most)
        self.sampling.check()
        self.keeping.check()
        self.engine.check()


def main(args: Sequence[str]) -> int | None:
    """The command. Returns the exit code; SystemExit 2 for the user's mistakes."""
    own, tuning = divided(args)
    default = Options(statements=tyro.MISSING, out=tyro.MISSING, checkpoint=tyro.MISSING)
    options = parse(Options, default, prog=PROG, description=DESCRIPTION, args=own)
    with clean_on_signals(), user_errors():
        options.check()
        tuning = _tuning(options, tuning)
        from dsv3_jax.posttrain.bounded_verifiers import bounded
        from dsv3_jax.posttrain.expert_iteration import Means, iterate
        from dsv3_jax.posttrain.iteration_folder import iteration_folder

        plan = _plan(options, tuning)
        process.emulate(options.engine.devices)
        with (
            iteration_folder(options.out) as folder,
            bounded(plan.judges, options.verifier_seconds) as judges,
        ):

            def open_source(checkpoint: Path) -> "Source":
                return _local(options, checkpoint)

            means = Means(judges, open_source, _tune, tuning, _progress, _say)
            code = iterate(plan, folder, means)
        if not code:
            print(f"{options.out / 'samples.jsonl'}; see {options.out / 'report.md'}")
        return code


def divided(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """This command's arguments, and those behind `--`."""
    args = list(args)
    place = args.index("--") if "--" in args else len(args)
    return args[:place], args[place + 1 :]


def _tuning(options: Options, given: Sequence[str]) -> list[str]:
    """The fine-tuning's arguments but for its data and place. ValueError for one that is taken;
    SystemExit as of sft: 2 for one that it does not know, 0 after its --help.
    """
    for arg in given:
        name = arg.partition("=")[0].replace("_", "-")
        if name in _TAKEN or name.startswith("--launch."):
            raise ValueError(f"{name} behind --: this command gives it, or has no use for it")
    if options.chat_template is not None:
        given = [*given, "--data.chat-template", str(options.chat_template.resolve())]
    run_at(options.checkpoint.parent, str(options.checkpoint), "--checkpoint")
    words = ["--init-from", str(options.checkpoint), *given]
    tried, _, _ = command.resolve(sft.COMMAND, words)
    check_fine_tuning(tried.run)
    sft.epochs_of(tried, words)
    return list(given)


def _plan(options: Options, tuning: Sequence[str]) -> "Plan":
    """JAX comes in no earlier than here."""
    from dsv3_jax.posttrain.iteration_plan import Inputs, read_plan

    template = options.chat_template
    inputs = Inputs(
        statements=options.statements,
        checkpoint=options.checkpoint,
        verifiers=options.verifier,
        held_out=options.held_out,
        samples=options.samples,
        kind=options.kind,
        templates=options.templates,
        decontaminate=options.decontaminate,
        rounds=options.rounds,
        attempts=options.attempts,
        ask=options.ask,
        tune_from=options.tune_from,
        seed=options.seed,
        sampling=options.sampling,
        keeping=options.keeping,
        more={
            "--dtype": options.dtype,
            "--chat-template": template and text_of(template),
            "--": list(tuning),
        },
    )
    return read_plan(inputs)


def _local(options: Options, checkpoint: Path) -> "Source":
    from dsv3_jax.posttrain.local_model import LocalModel

    template = options.chat_template
    sampling, engine = options.sampling, options.engine
    return LocalModel(checkpoint, sampling, engine, dtype=options.dtype, chat_template=template)


def _tune(words: Sequence[str]) -> int:
    return sft.main(words) or 0


def _say(line: str) -> None:
    print(line, flush=True)


@contextmanager
def _progress(stage: str, total: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yields what hears of every attempt, and says now and then how far it is."""
    counts = {"attempts": 0, "accepted": 0, "tokens": 0}
    begun = said = time.monotonic()

    def told(entry: Mapping[str, Any]) -> None:
        nonlocal said
        counts["attempts"] += 1
        if "failed" not in entry:
            counts["accepted"] += entry["verification"]["verdict"] == "accepted"
            counts["tokens"] += entry["tokens"] or 0
        now = time.monotonic()
        if now - said >= _QUIET_SECONDS or counts["attempts"] == total:
            said = now
            to_stderr(
                f"{stage}: {counts['attempts']:,} of {total:,} attempts, "
                f"{counts['accepted']:,} accepted, "
                f"{counts['tokens'] / max(now - begun, 1e-9):,.0f} tokens/s"
            )

    yield told


if __name__ == "__main__":
    process.prepare()
    run(main)
