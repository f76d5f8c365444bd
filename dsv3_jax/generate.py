"""`python -m dsv3_jax.generate`: a model of ours, or a Hugging Face folder's, continues texts."""

import io
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dsv3_jax import process
from dsv3_jax.cli import clean_on_signals, parse, run, to_stderr, user_errors
from dsv3_jax.files import whole_lines
from dsv3_jax.inference.options import EngineOptions, own_names
from dsv3_jax.train.console import printable

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from dsv3_jax.checkpoint.model_folder import OpenedModel
    from dsv3_jax.inference.answers import Ask
    from dsv3_jax.inference.engine import Engine
    from dsv3_jax.inference.opening import Opened
    from dsv3_jax.inference.prompt_file import Wishes
    from dsv3_jax.inference.requests import Request
    from dsv3_jax.inference.statistics import Statistics
    from dsv3_jax.inference.text import TextStream
    from dsv3_jax.inference.weights import Weights

PROG = "python -m dsv3_jax.generate"
DESCRIPTION = """Continue a text, or many.

What the model writes, without the prompt, goes to stdout as it comes, everything else to stderr.
The same options and seed give the same text. Ctrl-C or SIGTERM leaves.

--prompts FILE continues many at the same time. A file named .jsonl has an object a line: "prompt",
and as far as wished "max_tokens", "temperature", "top_p", "seed", "stop" (a string or a list) and
an "id" of any kind; of any other file each line is a prompt. Each answer is a line of JSON, in the
order of the file: "index" (from 0), the "id", "text", "prompt_tokens", "tokens", and "ended" by
"end" (of the text), "stop", "max_tokens" or "max_length"; or an "error", and the others go on. The
options from --rows on, for one prompt too, are those of the engine that does it.
"""
_ONE_OF = "one of --prompt, --prompt-file and --prompts is needed, and no two"


@dataclass(frozen=True)
class Options:
    """The command's options."""

    checkpoint: Path
    """A run's folder, its `checkpoints` or one `step_...` in it; or a Hugging Face folder"""
    prompt: str | None = None
    """The text to continue, after a begin-of-sentence token; '-' reads stdin, '' is none"""
    prompt_file: Path | None = None
    """A UTF-8 file to continue"""
    prompts: Path | None = None
    """A UTF-8 file of many: JSON Lines if it is named .jsonl, else one a line"""
    out: Path | None = None
    """A new file for the answers to --prompts; default: stdout"""
    logprobs: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """With answers to --prompts "logprobs", of each token at temperature 1, and their sum"""
    max_tokens: int = 200
    """Most tokens to write; model.max_length may end the text earlier"""
    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token each time"""
    top_p: float = 1.0
    """Draw from the likeliest tokens of this total probability alone; 1: from all"""
    seed: int = 0
    """Of what is drawn; of --prompts each has one more than the one before"""
    stop: tuple[str, ...] = ()
    """Strings before which the text ends"""
    step: int | None = None
    """Of a run; default: the newest"""
    ema: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Take the run's moving average of the weights"""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of the weights; default: bfloat16 for a run, as stored for a Hugging Face folder"""
    engine: Annotated[EngineOptions, tyro.conf.arg(name="")] = field(default_factory=EngineOptions)


def main(args: Sequence[str]) -> int | None:
    """The command. SystemExit 2 for the user's mistakes."""
    default = Options(checkpoint=tyro.MISSING)
    options = parse(Options, default, prog=PROG, description=DESCRIPTION, args=args)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may not have every character
        sys.stdout.reconfigure(errors="replace")
    with clean_on_signals():
        if options.prompts is None:
            _continue_one(options)
        else:
            _continue_many(options, options.prompts)


def _wishes(options: Options) -> "Wishes":
    """How every text goes on. ValueError for what cannot be.

    JAX comes in here, not before --help.
    """
    if options.max_tokens < 1:
        raise ValueError(f"--max-tokens is {options.max_tokens}; allowed: 1 or more")
    options.engine.check()
    process.emulate(options.engine.devices)
    from dsv3_jax.inference.prompt_file import Wishes

    wishes = Wishes(
        options.max_tokens, options.temperature, options.top_p, options.seed, options.stop
    )
    wishes.check()
    return wishes


# --- one -----------------------------------------------------------------------------------------


def _continue_one(options: Options) -> None:
    with user_errors():
        prompt, wishes = _prompt(options), _wishes(options)
        from dsv3_jax.inference.text import TextStream

        weights, mesh, opened = _opened(options)
        longest, request = opened.cfg.max_length, _request(prompt, wishes, opened)
        length = len(request.prompt)
        if length >= longest:
            raise ValueError(
                f"the prompt has {length} tokens, begin of sentence included; "
                f"allowed: below model.max_length = {longest}"
            )
        tokens, statistics = _tokens(options.engine, weights, mesh, request)
    if sys.stderr.isatty():
        to_stderr("compiling takes some seconds, longer the first time")
    text = TextStream(opened.tokenizer.token_bytes, wishes.stop)
    with user_errors((OSError,)):  # stdout's disk may be full
        written, ended = _write(tokens, text, opened.end_ids)
    if ended is None:
        ended = "--max-tokens" if written == wishes.max_tokens else "model.max_length"
    speed = length / statistics.reading
    said = (
        f"prompt {length:,} tokens, {speed:,.0f} tokens/s; written {written:,}{_cost(statistics)}"
    )
    print(f"{said}; ended by {ended}", file=sys.stderr)


def _prompt(options: Options) -> str:
    """ValueError or OSError if there is not exactly one text, in UTF-8."""
    if (options.prompt is None) == (options.prompt_file is None):
        raise ValueError(_ONE_OF)
    if options.out is not None or options.logprobs:
        raise ValueError("--out and --logprobs go with the answers to --prompts")
    if options.prompt_file is not None:
        name, content = str(options.prompt_file), options.prompt_file.read_bytes()
    elif options.prompt == "-":
        if sys.stdin is None:
            raise ValueError("--prompt - reads stdin, which is closed")
        name, content = "stdin", sys.stdin.buffer.read()
    else:
        name, content = "--prompt", os.fsencode(options.prompt)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: byte {content[error.start]:#04x} at offset {error.start} is not UTF-8"
        ) from None


def _tokens(
    options: EngineOptions, weights: "Weights", mesh: "Mesh | None", request: "Request"
) -> tuple[Iterator[int], "Statistics"]:
    """The tokens that follow, and what tells how long they took. One text alone comes faster
    without an engine, and does unless an option speaks of one.
    """
    from dsv3_jax.inference.answers import tokens_of
    from dsv3_jax.inference.statistics import Statistics

    if options != EngineOptions():
        engine = _engine(options, weights, mesh, [request])
        return tokens_of(engine, request), engine.statistics
    statistics = Statistics()
    return _plain_tokens(weights, request, statistics), statistics


def _plain_tokens(
    weights: "Weights", request: "Request", statistics: "Statistics"
) -> Iterator[int]:
    """Those of `inference.generate`."""
    import numpy as np

    from dsv3_jax.inference.generate import continued
    from dsv3_jax.inference.sampling import sampling

    prompt_BT = np.array([request.prompt])
    how = sampling(request.seed, request.temperature, request.top_p)
    count = min(request.max_tokens, weights.rest.cfg.max_length - len(request.prompt))
    for token_B in continued(weights, prompt_BT, count, how, statistics):
        yield int(token_B[0])


def _write(
    tokens: Iterator[int], text: "TextStream", end_ids: Collection[int]
) -> tuple[int, str | None]:
    """Writes the text to stdout as it comes, up to one of `end_ids`. Returns the number of its
    tokens, and what ended it before its length did.
    """
    written, ended = 0, None
    for token in tokens:
        if token in end_ids:
            ended = "the end of the text"
            break
        written += 1
        print(_shown(text.add(token)), end="", flush=True)
        if text.stopped:
            break
    print(_shown(text.finish()), flush=True)
    return written, "a stop string" if text.stopped else ended


def _shown(text: str) -> str:
    """Text that cannot steer a terminal, if it goes to one."""
    return printable(text, sys.stdout.encoding) if sys.stdout.isatty() else text


# --- many ----------------------------------------------------------------------------------------


def _continue_many(options: Options, file: Path) -> None:
    with ExitStack() as until_the_end:
        with user_errors():
            if options.prompt is not None or options.prompt_file is not None:
                raise ValueError(_ONE_OF)
            wishes = _wishes(options)
            from dsv3_jax.inference.prompt_file import read_prompts

            prompts, write = read_prompts(file, wishes), _print
            if options.out is not None:
                write = until_the_end.enter_context(whole_lines(options.out))
            weights, mesh, opened = _opened(options)
            requests = [_request(prompt.text, prompt.wishes, opened) for prompt in prompts]
            engine = _engine(options.engine, weights, mesh, requests)
            asks = list(zip(prompts, requests, strict=True))
        with user_errors((OSError,)):  # a disk may be full
            counts = _answer(options, asks, engine, opened.tokenizer.token_bytes, write)
    statistics = engine.statistics
    said = f"{len(prompts):,} prompts"
    if failed := counts["failed"]:
        said += f", {failed:,} of them failed"
    if statistics.read:
        speed = statistics.read / statistics.reading
        said += f"; read {statistics.read:,} tokens, {speed:,.0f} tokens/s"
    print(f"{said}; written {counts['written']:,}{_cost(statistics)}", file=sys.stderr)


def _answer(
    options: Options,
    asks: "Sequence[Ask]",
    engine: "Engine",
    token_bytes: Sequence[bytes],
    write: Callable[[str], None],
) -> Counter[str]:
    """Writes a line for each, in their order. Returns how many tokens were written, and how many
    prompts failed.
    """
    from dsv3_jax.inference.answers import line_of, texts_of
    from dsv3_jax.inference.progress import progress

    # Lines on the same terminal are progress enough.
    shown = sys.stderr.isatty() and not (write is _print and sys.stdout.isatty())
    counts = Counter()
    with progress(len(asks), lambda: _speed(engine.statistics), shown=shown) as told:
        texts = texts_of(engine, asks, token_bytes, told)
        for number, (ask, text) in enumerate(zip(asks, texts, strict=True)):
            if isinstance(text, ValueError):
                counts["failed"] += 1
            else:
                counts["written"] += len(text.logprobs)
            write(line_of(number, ask, text, options.logprobs))
    return counts


def _print(line: str) -> None:
    print(line, end="", flush=True)


# --- both ----------------------------------------------------------------------------------------


def _opened(options: Options) -> "Opened":
    from dsv3_jax.inference.opening import open_weights

    return open_weights(
        options.checkpoint,
        options.engine,
        step=options.step,
        average=options.ema,
        dtype=options.dtype,
    )


def _request(prompt: str, wishes: "Wishes", opened: "OpenedModel") -> "Request":
    from dsv3_jax.inference.requests import Request

    return Request(
        [opened.cfg.bos_id, *opened.tokenizer.encode(prompt).tolist()],
        wishes.max_tokens,
        wishes.temperature,
        wishes.top_p,
        wishes.seed,
        opened.end_ids,
    )


def _engine(
    options: EngineOptions, weights: "Weights", mesh: "Mesh | None", requests: "Sequence[Request]"
) -> "Engine":
    """An engine of the sizes that these requests need."""
    from dsv3_jax.inference.engine import Engine

    longest = weights.rest.cfg.max_length
    lengths = [min(len(one.prompt) + one.max_tokens, longest) for one in requests]
    with own_names():
        return Engine(weights, options.settings(lengths), mesh)


def _cost(statistics: "Statistics") -> str:
    """What goes on after a number of tokens: their speed, seconds of compilation."""
    speed = f", {_speed(statistics)}" if statistics.stepped else ""
    return f"{speed}; compiled in {statistics.compiling:,.1f} s"


def _speed(statistics: "Statistics") -> str:
    """Of decoding, and drafts that were accepted; empty before there is any."""
    if not statistics.stepped:
        return ""
    speed = f"{statistics.stepped / statistics.going_on:,.0f} tokens/s"
    if statistics.accepted_a_step is None:
        return speed
    drafts = len(statistics.offered)
    return f"{speed}, {statistics.accepted_a_step:.2f} of {drafts} drafts accepted"


if __name__ == "__main__":
    process.prepare()
    run(main)
