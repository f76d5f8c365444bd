"""A training step in FP8 against the same step in float32 on a CPU, side by side.

    python benchmarks/fp8_cpu.py [--python PATH ...] [--recipes fp8 fp8_pow2 ...]

A CPU has no FP8 products: operands are rounded as a recipe says and multiplied in float32, so this
is what the numerics cost when they are tried out, not what FP8 gains on a GPU. The step is that of
train_cpu.py: `bench_cpu`, 8 rows of 512 random tokens, float32 activations.

Expected: a table with a row for each recipe and interpreter; FP8 at least at 0.67 of float32's
speed (1.5 times the time) on jax 0.12, 0.56 (1.8) on 0.10.2. 5 to 10 minutes on two cores.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from contenders.contest_options import tell_figures
from contenders.own_step import StepOptions, own_step
from contenders.side_by_side import Contender, check_interpreters, contest
from contenders.table import table

from dsv3_jax.cli import parse, run, user_errors
from dsv3_jax.config.quant import RecipeName


@dataclass(frozen=True)
class Options(StepOptions):
    """What is compared, and how long."""

    recipes: tuple[RecipeName, ...] = ("fp8",)
    """Compared with float32"""


def main(args: Sequence[str]) -> None:
    """Prints one table."""
    options = parse(Options, Options(), prog="fp8_cpu.py", description=__doc__, args=args)
    with user_errors():
        check_interpreters(options.interpreters)
    pythons = options.pythons
    in_fp8 = [
        own_step(options, p, recipe, recipe=recipe) for p in pythons for recipe in options.recipes
    ]
    in_f32 = [[own_step(options, p, "float32")] for p in pythons]
    report(contest(in_fp8, in_f32, qualify=options.qualify, rounds=options.rounds), options)


def report(ran: Sequence[Contender], options: Options) -> None:
    """Prints the table, and keeps the figures if asked to."""
    tell_figures(options, ran, options.sizes, table(ran, ("float32",)))


if __name__ == "__main__":
    run(main)
