"""`python -m dsv3_jax.generate`: a model of ours, or a Hugging Face folder's, continues a text."""

import io
import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dsv3_jax import process
from dsv3_jax.cli import clean_on_signals, parse, run, to_stderr, user_errors
from dsv3_jax.train.console import printable

if TYPE_CHECKING:
    from dsv3_jax.checkpoint.model_folder import OpenedModel
    from dsv3_jax.inference.generate import Clock
    from dsv3_jax.inference.sampling import Sampling
    from dsv3_jax.inference.text import TextStream
    from dsv3_jax.inference.weights import Weights

PROG = "python -m dsv3_jax.generate"
DESCRIPTION = """Continue a text.

What the model writes, without the prompt, goes to stdout as it comes, everything else to stderr.
The same options and seed give the same text. Ctrl-C or SIGTERM leaves.
"""


@dataclass(frozen=True)
class Options:
    """The command's options."""

    checkpoint: Path
    """A run's folder, its `checkpoints` or one `step_...` in it; or a Hugging Face folder"""
    prompt: str | None = None
    """The text to continue, after a begin-of-sentence token; '-' reads stdin, '' is none"""
    prompt_file: Path | None = None
    """A UTF-8 file to continue"""
    max_tokens: int = 200
    """Most tokens to write; model.max_length may end the text earlier"""
    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token each time"""
    top_p: float = 1.0
    """Draw from the likeliest tokens of this total probability alone; 1: from all"""
    seed: int = 0
    """Of what is drawn"""
    stop: tuple[str, ...] = ()
    """Strings before which the text ends"""
    step: int | None = None
    """Of a run; default: the newest"""
    ema: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Take the run's moving average of the weights"""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of the weights; default: bfloat16 for a run, as stored for a Hugging Face folder"""


def main(args: Sequence[str]) -> int | None:
    """The command. SystemExit 2 for the user's mistakes."""
    default = Options(checkpoint=tyro.MISSING)
    options = parse(Options, default, prog=PROG, description=DESCRIPTION, args=args)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may not have every character
        sys.stdout.reconfigure(errors="replace")
    with clean_on_signals():
        _generate(options)


def _generate(options: Options) -> None:
    with user_errors():
        if options.max_tokens < 1:
            raise ValueError(f"--max-tokens is {options.max_tokens}; allowed: 1 or more")
        prompt = _prompt(options)
        # JAX comes in here, not before --help.
        from dsv3_jax.inference.generate import Clock
        from dsv3_jax.inference.sampling import sampling
        from dsv3_jax.inference.text import TextStream

        how = sampling(options.seed, options.temperature, options.top_p)
        TextStream((), options.stop)
        weights, opened = _load(options)
        cfg, tokenizer = opened.cfg, opened.tokenizer
        ids = [cfg.bos_id, *tokenizer.encode(prompt).tolist()]
        if len(ids) >= cfg.max_length:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, begin of sentence included; "
                f"allowed: below model.max_length = {cfg.max_length}"
            )
    if sys.stderr.isatty():
        to_stderr("compiling takes some seconds, longer the first time")
    text, clock = TextStream(tokenizer.token_bytes, options.stop), Clock()
    with user_errors((OSError,)):  # stdout's disk may be full
        written, ended = _write(weights, ids, options.max_tokens, how, text, clock, opened.end_ids)
    print(_summary(len(ids), written, clock, ended), file=sys.stderr)


def _prompt(options: Options) -> str:
    """ValueError or OSError if there is not exactly one text, in UTF-8."""
    if (options.prompt is None) == (options.prompt_file is None):
        raise ValueError("one of --prompt and --prompt-file is needed, and not both")
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


def _load(options: Options) -> tuple["Weights", "OpenedModel"]:
    """The model's weights laid out, and what was opened without its model."""
    from dsv3_jax.checkpoint.model_folder import open_model
    from dsv3_jax.inference.weights import lay_out

    opened = open_model(
        options.checkpoint, dtype=options.dtype, step=options.step, average=options.ema
    )
    step = "" if opened.step is None else f", step {opened.step:,}"
    to_stderr(f"{options.checkpoint}{step}")
    return lay_out(opened.model, consume=True), opened._replace(model=None)


def _write(
    weights: "Weights",
    ids: list[int],
    max_tokens: int,
    how: "Sampling",
    text: "TextStream",
    clock: "Clock",
    end_ids: Collection[int],
) -> tuple[int, str]:
    """Writes the text to stdout as it comes, up to one of `end_ids`. Returns the number of
    its tokens, and what ended it.
    """
    import numpy as np

    from dsv3_jax.inference.generate import continued

    cfg, ended = weights.rest.cfg, "--max-tokens"
    written, room = 0, cfg.max_length - len(ids)
    if room < max_tokens:
        max_tokens, ended = room, "model.max_length"
    for token_B in continued(weights, np.array([ids]), max_tokens, how, clock):
        if int(token_B[0]) in end_ids:
            ended = "the end of the text"
            break
        written += 1
        print(_shown(text.add(int(token_B[0]))), end="", flush=True)
        if text.stopped:
            break
    print(_shown(text.finish()), flush=True)
    return written, "a stop string" if text.stopped else ended


def _shown(text: str) -> str:
    """Text that cannot steer a terminal, if it goes to one."""
    return printable(text, sys.stdout.encoding) if sys.stdout.isatty() else text


def _summary(prompt: int, written: int, clock: "Clock", ended: str) -> str:
    """One line: tokens and tokens/s of prefill and decoding, seconds of compilation, the end."""
    line = f"prompt {prompt:,} tokens, {prompt / clock.prefill:,.0f} tokens/s; written {written:,}"
    if clock.decoded:
        line += f", {clock.decoded / clock.decoding:,.0f} tokens/s"
    return f"{line}; compiled in {clock.compiling:,.1f} s; ended by {ended}"


if __name__ == "__main__":
    process.prepare()
    run(main)
