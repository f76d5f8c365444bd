"""Greedy generation in float32 on a CPU, side by side: ours and transformers' `generate`.

    python benchmarks/decode_cpu.py --torch-python PATH [--python PATH ...] [--run FOLDER]

Batches: prompts of 128 random tokens, 128 tokens after them, of 1, 8 and 32 rows, of the shape
`bench_cpu`. The time is the whole of it on both sides, prefill included; tokens/s count the new
tokens of all rows. transformers keeps its cache and is the fastest of its variants in the
qualifying rounds: attention eager and sdpa, each with experts eager, batched_mm and grouped_mm.
batched_mm gathers a weight for every copy of a token, and is left out where these take more than
2 GB.

Serving: 32 requests with prompts of 16 to 256 tokens that ask for 16 to 256 more, all at once, and
coming at random, two a second; the engine with 8 rows, without drafts and with them, against static
batches of at most 8, of `continued` (all rows filled up to the longest prompt) and of `generate`.
Tokens/s count what was asked for; a column has the mean seconds from a request's coming to its end.
Weights are random, so that nearly no draft is taken and that line shows what drafts cost; with
--run they are a trained run's, but for transformers, and prompts are pieces of this project's
source. transformers' continuous batching is left out: that of 5.24 runs on a CPU, but its paged
cache has one size for all heads and does not take MLA's latents.

Expected: in batches, ours ahead by 4 with 1 row, 1.75 with 8, 1.5 with 32 at least; the engine
ahead of both kinds of static batches. Half an hour on two cores.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from contenders.contest_options import tell_figures
from contenders.serving import (
    BATCHES,
    ServingOptions,
    batching,
    engines,
    forms_of_experts,
    generating,
    served_model,
)
from contenders.side_by_side import Contender, check_interpreters, contest, environment
from contenders.table import table

from dsv3_jax.cli import parse, run, user_errors
from dsv3_jax.config.presets import bench_cpu


@dataclass(frozen=True)
class Options(ServingOptions):
    """What the batches are."""

    rows: tuple[int, ...] = (1, 8, 32)
    """Batches, one contest each"""
    prompt: int = 128
    """Tokens of a prompt"""
    tokens: int = 128
    """Tokens that follow it"""


def main(args: Sequence[str]) -> None:
    """Prints one table."""
    options = parse(Options, Options(), prog="decode_cpu.py", description=__doc__, args=args)
    if not options.torch_python:
        print("skipped: no rival, give --torch-python")
        return
    with user_errors():
        check_interpreters(options.interpreters)
        served = served_model(options) if options.requests else None
    ran, times = [], {"qualify": options.qualify, "rounds": options.rounds}
    for rows in options.rows:
        ran += contest(ours(options, rows), [transformers(options, rows)], **times)
    for rate in options.rates if served else ():
        rivals = [generating(options, served, rate), batching(options, served, rate)]
        ran += contest(engines(options, served, rate), rivals, **times)
    report(ran, options)


def ours(options: Options, rows: int) -> list[Contender]:
    """This project under each interpreter."""
    more = {"model": dataclasses.asdict(bench_cpu())}
    return [
        _contender(options, rows, "dsv3_jax", python, "decode_dsv3.py", more)
        for python in (sys.executable, *options.python)
    ]


def transformers(options: Options, rows: int) -> list[Contender]:
    """Its variants."""
    experts = forms_of_experts(bench_cpu(), rows * options.prompt, f"{rows} rows")
    config = bench_cpu().to_hf() | {"torch_dtype": "float32"}
    return [
        _contender(
            options,
            rows,
            f"transformers {attention}, experts {form}",
            options.torch_python,
            "decode_transformers.py",
            {"config": config, "attention": attention, "experts": form},
        )
        for attention in ("eager", "sdpa")
        for form in experts
    ]


def _contender(
    options: Options, rows: int, name: str, python: str, script: str, more: dict[str, Any]
) -> Contender:
    sizes = {"rows": rows, "prompt": options.prompt, "tokens": options.tokens}
    return Contender(
        name=name,
        group=f"{rows} rows" if rows > 1 else "1 row",
        python=python,
        script=script,
        options={**sizes, "warm_up": options.warm_up, **more},
        tokens=rows * options.tokens,
        environment=environment(options.allocator),
    )


def report(ran: Sequence[Contender], options: Options) -> None:
    """Prints the table, and keeps the figures if asked to."""
    sizes = f"float32, {options.tokens} tokens after prompts of {options.prompt}"
    if options.requests:
        asked, prompts = (
            f"{fewest} to {most}"
            for fewest, most in (options.request_tokens, options.request_prompt)
        )
        sizes += f"; requests of {asked} tokens after prompts of {prompts}"
        sizes += f", {options.serving_rows} rows"
    tell_figures(options, ran, sizes, table(ran, ("transformers", BATCHES)))


if __name__ == "__main__":
    run(main)
