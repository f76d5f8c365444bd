"""Greedy generation in float32 on a CPU, side by side: ours and transformers' `generate`.

    python benchmarks/decode_cpu.py --torch-python PATH [--python PATH ...]

Prompts of 128 random tokens, 128 tokens after them, of 1, 8 and 32 rows, of the shape `bench_cpu`.
The time is the whole of it on both sides, prefill included; tokens/s count the new tokens of all
rows. transformers keeps its cache and is the fastest of its variants in the qualifying rounds:
attention eager and sdpa, each with experts eager, batched_mm and grouped_mm. batched_mm gathers
a weight for every copy of a token, and is left out where these take more than 2 GB.

Expected: ours ahead by 4 with 1 row, 1.75 with 8, 1.5 with 32 at least. Some 10 minutes on two
cores.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from contenders.contest_options import ContestOptions, tell_figures
from contenders.side_by_side import (
    Contender,
    check_interpreters,
    contest,
    environment,
    tell,
)
from contenders.table import table

from dsv3_jax.cli import parse, run, user_errors
from dsv3_jax.config.presets import bench_cpu

MOST_GATHERED = 2e9  # bytes of weights that batched_mm may gather


@dataclass(frozen=True)
class Options(ContestOptions):
    """Who is compared, and how long."""

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
    ran = []
    for rows in options.rows:
        ran += contest(
            ours(options, rows),
            [transformers(options, rows)],
            qualify=options.qualify,
            rounds=options.rounds,
        )
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
    experts = ["eager", "grouped_mm"]
    if gathered_bytes(rows * options.prompt) <= MOST_GATHERED:
        experts.append("batched_mm")
    else:
        tell(f"{rows} rows: without experts batched_mm, whose gathered weights take too much")
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


def gathered_bytes(tokens: int) -> int:
    """Of float32 weights of gate, up and down, one of each for every copy of a token."""
    model = bench_cpu()
    return tokens * model.experts_per_token * 3 * model.d_model * model.expert_hidden * 4


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
    tell_figures(options, ran, sizes, table(ran, ("transformers",)))


if __name__ == "__main__":
    run(main)
