"""A training step in FP8 against the same step in float32 on a CPU, side by side.

    python benchmarks/fp8_cpu.py [--python PATH ...] [--recipes fp8 fp8_pow2 ...]

A CPU has no FP8 products: operands are rounded as a recipe says and multiplied in float32, so this
is what the numerics cost when they are tried out, not what FP8 gains on a GPU. The step is that of
train_cpu.py: `bench_cpu`, 8 rows of 512 random tokens, float32 activations.

Expected: a table with a row for each recipe and interpreter; FP8 at least at 0.67 of float32's
speed (1.5 times the time) on jax 0.12, 0.56 (1.8) on 0.10.2. 5 to 10 minutes on two cores.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import tyro
from contenders.contest_options import ContestOptions, tell_figures
from contenders.side_by_side import Contender, check_interpreters, contest, environment
from contenders.table import table

from dsv3_jax.cli import parse, run, user_errors
from dsv3_jax.config.presets import bench_cpu
from dsv3_jax.config.quant import RecipeName


@dataclass(frozen=True)
class Options(ContestOptions):
    """What is compared, and how long."""

    torch_python: tyro.conf.Suppress[str | None] = None
    recipes: tuple[RecipeName, ...] = ("fp8",)
    """Compared with float32"""
    rows: int = 8
    """Rows of a step"""
    length: int = 512
    """Tokens of a row"""


def main(args: Sequence[str]) -> None:
    """Prints one table."""
    options = parse(Options, Options(), prog="fp8_cpu.py", description=__doc__, args=args)
    with user_errors():
        check_interpreters(options.interpreters)
    pythons = (sys.executable, *options.python)
    in_fp8 = [_contender(options, p, recipe) for p in pythons for recipe in options.recipes]
    in_f32 = [[_contender(options, p, "f32")] for p in pythons]
    report(contest(in_fp8, in_f32, qualify=options.qualify, rounds=options.rounds), options)


def _contender(options: Options, python: str, recipe: RecipeName) -> Contender:
    return Contender(
        name="float32" if recipe == "f32" else recipe,
        group=f"interpreter {(sys.executable, *options.python).index(python) + 1}",
        python=python,
        script="train_dsv3.py",
        options={
            "rows": options.rows,
            "length": options.length,
            "warm_up": options.warm_up,
            "model": dataclasses.asdict(bench_cpu()),
            "dtype": "float32",
            "remat": "none",
            "recipe": recipe,
        },
        tokens=options.rows * options.length,
        environment=environment(options.allocator),
    )


def report(ran: Sequence[Contender], options: Options) -> None:
    """Prints the table, and keeps the figures if asked to."""
    sizes = f"{options.rows} rows of {options.length} tokens"
    tell_figures(options, ran, sizes, table(ran, ("float32",)))


if __name__ == "__main__":
    run(main)
