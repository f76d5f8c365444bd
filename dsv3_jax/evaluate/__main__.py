"""`python -m dsv3_jax.evaluate`: benchmarks through lm-eval, and perplexity of texts without it."""

import importlib.util
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dsv3_jax import process
from dsv3_jax.cli import clean_on_signals, parse, run, to_stderr, user_errors
from dsv3_jax.evaluate.protocol import CHAT_TOKENS, Wish, check_runs, chosen
from dsv3_jax.inference.options import EngineOptions

if TYPE_CHECKING:
    from dsv3_jax.evaluate.harness import Harness
    from dsv3_jax.evaluate.results import Results
    from dsv3_jax.evaluate.rolling import TextScore
    from dsv3_jax.evaluate.subject import Subject

PROG = "python -m dsv3_jax.evaluate"
DESCRIPTION = """Evaluate a model: benchmarks by lm-eval's definitions, texts by perplexity.

--tasks takes names of lm-eval's tasks, with commas between (mmlu,gsm8k,humaneval,ceval-valid: these
fetch their data sets), or of task files in --include-path, which need no network. lm-eval is the
extra `evaluate`. --perplexity needs nothing: nats per token and bits per byte of any UTF-8 files.
With --chat the report's protocol for chat models holds: the chat template, answers of at most 8,192
tokens, sets of fewer than 1,000 samples several times at several temperatures (mean and spread).

The table goes to stdout, progress to stderr; --out has it too, with JSON, every sample, and what is
needed to repeat it. The options from --rows on are those of the engine that writes answers.
"""


@dataclass(frozen=True)
class Options:
    """The command's options."""

    checkpoint: Path
    """A run's folder, its `checkpoints` or one `step_...` in it; or a Hugging Face folder"""
    tasks: str = ""
    """Names of tasks or groups of lm-eval, with commas between"""
    include_path: Path | None = None
    """A folder with task files of your own"""
    perplexity: tuple[Path, ...] = ()
    """UTF-8 files, each scored as one text"""
    out: Path | None = None
    """A new folder for results.json, results.md and samples"""
    limit: int | None = None
    """Take the first samples of each set only: to try out, not to compare"""
    num_fewshot: int | None = None
    """Examples before each question; default: each task's own"""
    chat: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Ask through the chat template, by the report's protocol for chat models"""
    chat_template: Path | None = None
    """A Jinja file; default: the folder's own, else DeepSeek's"""
    temperatures: tuple[float, ...] = ()
    """For sets below 1,000 samples whose answers are written; default: with --chat 0.3, 0.6 and
    0.9, else each task's own"""
    repeats: int = 1
    """Runs at each of --temperatures above 0, each with a seed of its own"""
    max_tokens: int | None = None
    """Most tokens of an answer; default: 8,192 with --chat, else each task's own, or 256"""
    seed: int = 0
    """Of what is drawn"""
    batch: int = 16
    """Rows that are scored at a time, on each device"""
    stride: int | None = None
    """Tokens of --perplexity's further windows that are scored, the rest is read before them;
    default: half of the model's length"""
    confirm_run_unsafe_code: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run programs that the model writes, as you, on this machine: HumanEval and its kin"""
    step: int | None = None
    """Of a run; default: the newest"""
    ema: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Take the run's moving average of the weights"""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of the weights; default: bfloat16 for a run, as stored for a Hugging Face folder"""
    engine: Annotated[EngineOptions, tyro.conf.arg(name="")] = field(default_factory=EngineOptions)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.tasks.split(",") if name.strip())

    def check(self) -> None:
        """ValueError, in the names of the options."""
        if not self.names and not self.perplexity:
            raise ValueError("--tasks, --perplexity or both are needed")
        for name, value, least in (
            ("limit", self.limit, 1),
            ("num-fewshot", self.num_fewshot, 0),
            ("max-tokens", self.max_tokens, 1),
            ("batch", self.batch, 1),
            ("stride", self.stride, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"--{name} is {value}; allowed: {least} or more")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed is {self.seed}; allowed: 0 to 2^32 - 1")
        check_runs(self.temperatures, self.repeats, self.chat)
        self._check_companions()
        self.engine.check()
        if self.out is not None and _is_in_use(self.out):
            raise ValueError(f"--out {self.out} exists already; allowed: a new or an empty folder")
        if self.names and importlib.util.find_spec("lm_eval") is None:
            raise ValueError(
                "--tasks needs lm-eval, which is not installed: python -m pip install lm_eval "
                "(the extra `evaluate`); --perplexity works without"
            )

    def _check_companions(self) -> None:
        """An option that would be ignored."""
        for name, value, companion, there in (
            ("chat-template", self.chat_template, "chat", self.chat),
            ("stride", self.stride, "perplexity", self.perplexity),
            ("include-path", self.include_path, "tasks", self.names),
            ("limit", self.limit, "tasks", self.names),
            ("num-fewshot", self.num_fewshot, "tasks", self.names),
            ("temperatures", self.temperatures or None, "tasks", self.names),
            ("max-tokens", self.max_tokens, "tasks", self.names),
            ("chat", self.chat or None, "tasks", self.names),
        ):
            if value is not None and not there:
                raise ValueError(f"--{name} goes with --{companion}")


def main(args: Sequence[str]) -> int | None:
    """The command. SystemExit 2 for the user's mistakes."""
    default = Options(checkpoint=tyro.MISSING)
    options = parse(Options, default, prog=PROG, description=DESCRIPTION, args=args)
    with clean_on_signals():
        with user_errors():
            options.check()
            process.emulate(options.engine.devices)
            results, samples = _evaluate(options, args)
        print(results.to_markdown(), end="")
        if options.out is not None:
            with user_errors():
                _write(options.out, results, samples)


def _is_in_use(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _evaluate(options: Options, args: Sequence[str]) -> tuple["Results", dict[str, Any]]:
    """JAX comes in here, not before --help."""
    if options.out is not None:
        from dsv3_jax.checkpoint.new_folder import check_free_name

        check_free_name(options.out, overwrite=False)
    if options.stride is not None:
        _check_stride(options.stride, options.checkpoint)
    texts = _texts(options.perplexity)
    wish = _wish(options)
    loaded = None
    if options.names:  # before the model, which takes longer
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars, in a log
        from dsv3_jax.evaluate import tasks

        loaded = tasks.load(wish)
    began = time.monotonic()
    subject = _subject(options)
    scores, samples = [], {}
    text_scores = _text_scores(options, subject, texts)
    if loaded is not None:
        ran = tasks.run(loaded, _harness(options, subject), wish)
        scores, samples = ran.scores, ran.samples
    from dsv3_jax.evaluate.results import Results

    made = _made(options, args, subject, time.monotonic() - began)
    return Results(made, dict(subject.counts), scores, text_scores), samples


def _check_stride(stride: int, checkpoint: Path) -> None:
    """Before weights are read."""
    from dsv3_jax.checkpoint.model_folder import find
    from dsv3_jax.config.load import load_json

    longest = load_json(find(checkpoint).folder / "config.json").model.max_length
    if stride > longest:
        raise ValueError(f"--stride is {stride}; allowed: 1 to model.max_length = {longest}")


def _texts(files: Sequence[Path]) -> dict[str, str]:
    from dsv3_jax.evaluate.rolling import read_text

    return {str(file): read_text(file) for file in files}


def _wish(options: Options) -> Wish:
    return Wish(
        options.names,
        options.include_path,
        options.limit,
        options.num_fewshot,
        options.chat,
        chosen(options.temperatures, options.chat),
        options.repeats,
        options.seed,
        options.confirm_run_unsafe_code,
    )


def _subject(options: Options) -> "Subject":
    from dsv3_jax.evaluate.subject import Subject
    from dsv3_jax.inference.opening import open_weights

    opened = open_weights(
        options.checkpoint,
        options.engine,
        step=options.step,
        average=options.ema,
        dtype=options.dtype,
    )
    return Subject(opened, options.engine, options.batch)


def _text_scores(
    options: Options, subject: "Subject", texts: dict[str, str]
) -> dict[str, "TextScore"]:
    """Of each file, and of all together if there are several."""
    if not texts:
        return {}
    stride = options.stride or max(subject.longest // 2, 1)
    found = dict(zip(texts, subject.rolling(list(texts.values()), stride), strict=True))
    if len(found) > 1:
        first, *others = found.values()
        found[f"all {len(found)}"] = sum(others, start=first)
    return found


def _harness(options: Options, subject: "Subject") -> "Harness":
    from dsv3_jax.checkpoint.model_folder import find
    from dsv3_jax.evaluate.conversations import Conversations
    from dsv3_jax.evaluate.harness import Harness

    chat, most = None, options.max_tokens
    if options.chat:
        most = most or CHAT_TOKENS
        if options.chat_template is None:
            folder = find(options.checkpoint).folder
            chat = Conversations.of_folder(folder, subject.tokenizer)
        else:
            chat = Conversations.of_file(options.chat_template, subject.tokenizer)
        to_stderr(f"chat template: {chat.name}")
    return Harness(subject, chat, most)


def _made(
    options: Options, args: Sequence[str], subject: "Subject", seconds: float
) -> dict[str, Any]:
    """What is needed to repeat it."""
    from dsv3_jax.evaluate.origin import checkpoint_of, versions
    from dsv3_jax.train.machine import describe

    made = {
        "checkpoint": checkpoint_of(options.checkpoint, subject.folder, subject.scorer.weights),
        "command": shlex.join([*PROG.split(), *args]),
        "versions": versions(),
        "machine": describe(),
        "seconds": round(seconds, 1),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if options.perplexity:
        made["stride"] = options.stride or max(subject.longest // 2, 1)
    if options.names:
        from dsv3_jax.evaluate.tasks import FEWSHOT_SEED

        limit = CHAT_TOKENS if options.chat else "each task's own, or 256"
        made |= {
            "protocol": "chat (report 5.3.1)" if options.chat else "base (report 4.4.1)",
            "most tokens of an answer": options.max_tokens or limit,
            "seed": options.seed,
            "seed of few-shot examples": FEWSHOT_SEED,
        }
    return made


def _write(out: Path, results: "Results", samples: dict[str, Any]) -> None:
    from dsv3_jax.checkpoint.new_folder import new_folder
    from dsv3_jax.evaluate.results import write_results

    with new_folder(out, 2**20, overwrite=False) as folder:
        write_results(folder, results, samples)
    to_stderr(str(out))


if __name__ == "__main__":
    process.prepare()
    run(main)
