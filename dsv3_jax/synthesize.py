"""`python -m dsv3_jax.synthesize`: samples for fine-tuning, written by a model and judged."""

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dsv3_jax import process
from dsv3_jax.cli import clean_on_signals, parse, run, to_stderr, user_errors
from dsv3_jax.config.fields import check
from dsv3_jax.inference.options import EngineOptions
from dsv3_jax.posttrain.setting_files import text_of
from dsv3_jax.posttrain.synthesis_options import Sampling, Selection

if TYPE_CHECKING:
    from dsv3_jax.posttrain.completions import Source
    from dsv3_jax.posttrain.served_model import Server
    from dsv3_jax.posttrain.synthesis import Inputs

PROG = "python -m dsv3_jax.synthesize"
DESCRIPTION = """Write samples for fine-tuning: ask a model, judge its answers, keep the good ones.

--prompts is a file of JSON Lines, an object a line: "prompt", or "messages" that end with a user's
turn; and as far as wished "id", "reference" (what verifiers compare with), "kind", "values" (of
names in the kind's template) and "response" (the original one of a problem: nothing is asked then).
A kind is reasoning_original (problem and answer), reasoning_reflective (behind a system prompt that
asks to reflect and verify), reasoning (both), writing, factual_qa, self_cognition (wants --value
name=... developer=...) or translation (wants "language" among its values).

Answers come from --server and --model (OpenAI's chat completions: ours, vLLM's, a hosted service)
or from --checkpoint; the options from --rows on are those of its engine. --verifier takes exact,
boxed, proof, regex, regex:PATTERN, json, json:KEY,KEY, words:LEAST-MOST or python:module:function,
behind KIND= for one kind alone; all must accept an answer.

--out holds samples.jsonl, which fine-tuning reads, fates.jsonl (why a candidate is none of them),
report.md, report.json, lengths.png, and candidates.jsonl, to which every answer goes as it comes.
Stopped at any moment, the same command goes on where it was.
"""
_QUIET_SECONDS = 30.0  # between two lines of progress where there is no terminal


@dataclass(frozen=True)
class Options:
    """The command's options."""

    prompts: Path
    """A file of JSON Lines"""
    out: Path
    """A new folder, or one in which this command was stopped"""
    server: str | None = None
    """Address of an OpenAI-compatible server, with or without its /v1"""
    model: str | None = None
    """What the server calls the model"""
    api_key_env: str | None = None
    """Variable of the environment that holds the server's key"""
    concurrency: int = 8
    """Requests at the same time"""
    timeout: float = 600.0
    """Seconds that a server may be silent"""
    retries: int = 5
    """Of a request that fails in passing, with growing pauses"""
    checkpoint: Path | None = None
    """A run's folder, its `checkpoints` or one `step_...` in it; or a Hugging Face folder"""
    step: int | None = None
    """Of a run; default: the newest, and that of before when it goes on"""
    ema: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Take the run's moving average of the weights"""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of the weights; default: bfloat16 for a run, as stored for a Hugging Face folder"""
    chat_template: Path | None = None
    """A Jinja file for --checkpoint; default: the folder's own, else DeepSeek's"""
    kind: str | None = None
    """Of lines that name none"""
    templates: Path | None = None
    """A JSON file of own templates: {"writing": {"system": "...", "user": "{{ prompt }}"}}"""
    value: tuple[str, ...] = ()
    """NAME=TEXT for all templates"""
    candidates: int = 4
    """Answers to each problem"""
    verifier: tuple[str, ...] = ()
    """Judges of answers; default: whatever is whole and not empty passes"""
    decontaminate: tuple[Path, ...] = ()
    """Evaluation sets, .jsonl or plain text, that no sample may show"""
    reviewed: Path | None = None
    """A copy of samples.jsonl with people's verdicts: "verification": {"by": "human", ...}"""
    reselect: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Select anew from what --out holds; --decontaminate, --reviewed and the options from --keep to
    --contamination-ngram may then differ"""
    seed: int = 0
    """Of what is drawn"""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    selection: Annotated[Selection, tyro.conf.arg(name="")] = field(default_factory=Selection)
    engine: Annotated[EngineOptions, tyro.conf.arg(name="")] = field(default_factory=EngineOptions)

    def check(self) -> None:
        """ValueError, in the names of the options."""
        if (self.server is None) == (self.checkpoint is None):
            raise ValueError("one of --server and --checkpoint is needed, and no two")
        if (self.server is None) != (self.model is None):
            raise ValueError("--server and --model go together")
        self._check_unused()
        check("--candidates", self.candidates, 1 <= self.candidates <= 10**6, "1 to 1,000,000")
        check("--seed", self.seed, 0 <= self.seed < 2**63, "0 to 2^63 - 1")
        if self.sampling.temperature == 0:
            most = "1, since all are the same at --temperature 0"
            check("--candidates", self.candidates, self.candidates == 1, most)
        self.sampling.check()
        self.selection.check()
        self.engine.check()
        if self.server is not None:
            self.served()

    def served(self) -> "Server":
        """What --server and the options beside it say. ValueError for what cannot be."""
        from dsv3_jax.posttrain.served_model import Server

        key, name = None, self.api_key_env
        if name is not None:
            key = os.environ.get(name, "").strip()
            if not (key and key.isascii() and key.isprintable()):
                raise ValueError(f"--api-key-env {name}: no key there")
        server = Server(self.server, self.model, key, self.concurrency, self.timeout, self.retries)
        server.check()
        return server

    def _check_unused(self) -> None:
        """An option that would do nothing."""
        of_checkpoints = ("step", "ema", "dtype", "chat_template", "engine")
        names = ("api_key_env",) if self.server is None else of_checkpoints
        for name in names:
            if getattr(self, name) not in (None, False, EngineOptions()):
                said = "the engine's options" if name == "engine" else f"--{name}".replace("_", "-")
                other = "--server" if self.server is None else "--checkpoint"
                raise ValueError(f"{said}: allowed with {other} alone")

    def values(self) -> dict[str, str]:
        """Of --value."""
        named = [text.partition("=") for text in self.value]
        for name, separator, _ in named:
            if not (name.isidentifier() and separator):
                raise ValueError(f"--value is {name}; allowed: NAME=TEXT")
        return {name: text for name, _, text in named}


def main(args: Sequence[str]) -> int | None:
    """The command. SystemExit 2 for the user's mistakes."""
    default = Options(prompts=tyro.MISSING, out=tyro.MISSING)
    options = parse(Options, default, prog=PROG, description=DESCRIPTION, args=args)
    with clean_on_signals(), user_errors():
        options.check()
        from dsv3_jax.posttrain.synthesis import read_work, synthesise
        from dsv3_jax.posttrain.synthesis_folder import synthesis_folder

        work = read_work(_inputs(options))
        with synthesis_folder(options.out) as folder:

            def open_source(step: int | None) -> "Source":
                return _served(options) if options.server else _local(options, step)

            found = synthesise(work, folder, open_source, _progress, options.reselect)
        print(_summary(options.out, found))


def _inputs(options: Options) -> "Inputs":
    """JAX comes in no earlier than the model."""
    from dsv3_jax.posttrain.synthesis import Inputs

    template = options.chat_template
    return Inputs(
        prompts=options.prompts,
        kind=options.kind,
        templates=options.templates,
        values=options.values(),
        verifiers=options.verifier,
        decontaminate=options.decontaminate,
        reviewed=options.reviewed,
        candidates=options.candidates,
        seed=options.seed,
        sampling=options.sampling,
        selection=options.selection,
        model={
            "--model": options.model,
            "--checkpoint": options.checkpoint and str(options.checkpoint.resolve()),
            "--step": options.step,
            "--ema": options.ema,
            "--dtype": options.dtype,
            "--chat-template": template and text_of(template),
        },
    )


def _served(options: Options) -> "Source":
    from dsv3_jax.posttrain.served_model import ServedModel

    return ServedModel(options.served(), options.sampling)


def _local(options: Options, step: int | None) -> "Source":
    process.emulate(options.engine.devices)
    from dsv3_jax.posttrain.local_model import LocalModel

    return LocalModel(
        options.checkpoint,
        options.sampling,
        options.engine,
        step=step,
        average=options.ema,
        dtype=options.dtype,
        chat_template=options.chat_template,
    )


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yields what hears of every answer: a bar on a terminal, else a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
    shown = sys.stderr.isatty()
    counts, begun = Counter(), time.monotonic()
    said = begun
    with Progress(
        *columns, TimeElapsedColumn(), console=Console(stderr=True), disable=not shown
    ) as bar:
        task = bar.add_task("asked for", total=total)

        def told(entry: Mapping[str, Any]) -> None:
            nonlocal said
            counts.update(_counted(entry))
            now = time.monotonic()
            line = f"{counts['answers']:,} of {total:,} answers, {_speeds(counts, now - begun)}"
            bar.update(task, completed=counts["answers"], description=line.partition(", ")[2])
            if not shown and now - said >= _QUIET_SECONDS:
                to_stderr(line)
                said = now

        yield told


def _counted(entry: Mapping[str, Any]) -> dict[str, int]:
    if "failed" in entry:
        return {"answers": 1, "failed": 1}
    rejected = entry["verification"]["verdict"] == "rejected"
    return {"answers": 1, "accepted": int(not rejected), "tokens": entry["tokens"] or 0}


def _speeds(counts: Mapping[str, int], seconds: float) -> str:
    said = f"{counts['accepted']:,} accepted"
    if counts["failed"]:
        said += f", {counts['failed']:,} failed"
    return f"{said}, {counts['tokens'] / max(seconds, 1e-9):,.0f} tokens/s"


def _summary(out: Path, found: Mapping[str, Any]) -> str:
    """What was written."""
    fates = dict(found["fates"])
    kept, candidates = fates.pop("kept"), found["candidates"]
    lost = "".join(f"; {count:,} {fate}" for fate, count in fates.items() if count)
    skipped = found["problems contaminated"]
    asked = f"{found['problems']:,} problems" + (f", {skipped:,} contaminated" if skipped else "")
    return (
        f"{out / 'samples.jsonl'}: {kept:,} samples of {found['problems with a sample']:,} "
        f"problems; {asked}; {candidates:,} candidates{lost}; see {out / 'report.md'}"
    )


if __name__ == "__main__":
    process.prepare()
    run(main)
