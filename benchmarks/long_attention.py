"""Causal attention of one device over longer and longer rows: memory and time, with gradients.

    python benchmarks/long_attention.py [--lengths 1024 ...] [--heads 2] [--memory 8] [--turns 3]

MLA's shape in miniature (queries and keys 48, values 32), bfloat16, one row. `blocks` is what rows
of more than 4,096 tokens are computed with, `chunks` what shorter ones are; `jax.nn` is JAX's own,
which makes all scores. Memory is what a compiled program says that it needs beside its arguments
and results; what would take more than --memory GB is left out. All run by turns; the median counts.

Expected: memory of blocks grows with the length, that of the others with its square. Some ten
minutes on two cores.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the package is not installed

from contenders import command_line

from dsv3_jax.cli import fail, run

QK, V = 48, 32
SCALE = 1 / math.sqrt(QK)
SLOW = 20.0  # seconds of a turn, after which there is no other


def parsed(args: Sequence[str]) -> argparse.Namespace:
    """Exits 0 after --help, 2 after a mistake."""
    parser = command_line.parser("long_attention.py", __doc__)
    add = parser.add_argument
    lengths = [1024 * 2**n for n in range(7)]
    add("--lengths", type=int, nargs="+", default=lengths, help="tokens of a row")
    add("--heads", type=int, default=2)
    add("--memory", type=float, default=8.0, help="GB that a program may take")
    add("--turns", type=int, default=3, help="of each; one where it takes more than 20 s")
    options = command_line.parsed(parser, args)
    for name, value in (("lengths", min(options.lengths)), ("heads", options.heads)):
        if value < 1:
            fail(f"--{name} is {value}; allowed: at least 1")
    for name in ("memory", "turns"):
        if not getattr(options, name) > 0:
            fail(f"--{name} is {getattr(options, name)}; allowed: positive numbers")
    return options


def main(args: Sequence[str]) -> None:
    """Prints one table, row by row."""
    options = parsed(args)
    import jax

    from dsv3_jax.train.machine import describe

    print(f"{describe()}\n")
    columns = (
        "tokens",
        "variant",
        "memory, MB",
        "bytes a token and head",
        "seconds",
        "times blocks' speed",
    )
    for row in (columns, ["---"] * len(columns)):
        print(f"| {' | '.join(row)} |")
    for length in options.lengths:
        print(f"{length:,} tokens ...", file=sys.stderr, flush=True)
        for row in rows_of(length, options, jax):
            print(f"| {' | '.join(row)} |", flush=True)


def rows_of(length: int, options: argparse.Namespace, jax) -> list[list[str]]:
    """Of the table, for one length."""
    programs, needed, rows = {}, {}, []
    operands = inputs(length, options.heads, jax)
    for name, form in variants(jax).items():
        if name != "blocks" and 4 * options.heads * length**2 / 16 > options.memory * 1e9:
            needed[name] = math.inf  # not even compiled: a sixteenth of all scores is too much
            continue
        program = with_gradients(form, jax).lower(*operands).compile()
        needed[name] = program.memory_analysis().temp_size_in_bytes
        if needed[name] <= options.memory * 1e9:
            programs[name] = program
    seconds = timed(programs, operands, options.turns, jax)
    for name, size in needed.items():
        if name not in seconds:
            rows.append([f"{length:,}", name, f"over {options.memory:g} GB", "", "", ""])
            continue
        each = size / length / options.heads
        ratio = f"{seconds['blocks'] / seconds[name]:.2f}" if "blocks" in seconds else ""
        figures = f"{size / 1e6:,.1f}", f"{each:,.0f}", f"{seconds[name]:.3f}", ratio
        rows.append([f"{length:,}", name, *figures])
    return rows


def variants(jax) -> dict[str, Callable]:
    """By name, each of q, k and v."""
    from dsv3_jax.model.attention import attention
    from dsv3_jax.model.blockwise import blockwise_attention

    own = partial(jax.nn.dot_product_attention, scale=SCALE, is_causal=True)
    return {
        "blocks": partial(blockwise_attention, scale=SCALE),
        "chunks": lambda q, k, v: attention(q, k, v, SCALE),
        "jax.nn": lambda q, k, v: own(q, k, jax.numpy.pad(v, ((0, 0),) * 3 + ((0, QK - V),))),
    }


def inputs(length: int, heads: int, jax) -> list:
    """Queries, keys and values."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(1, length, heads, size) for size in (QK, QK, V)]
    return [
        jax.random.normal(key, shape, jax.numpy.bfloat16)
        for key, shape in zip(keys, shapes, strict=True)
    ]


def with_gradients(form: Callable, jax) -> Callable:
    """Jitted: the output's sum of squares by queries, keys and values."""

    def total(q, k, v):
        return jax.numpy.square(form(q, k, v).astype(jax.numpy.float32)).sum()

    return jax.jit(jax.grad(total, (0, 1, 2)))


def timed(programs: dict[str, Callable], operands: list, turns: int, jax) -> dict[str, float]:
    """Median seconds of each, by turns."""
    spent: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(turns + 1):
        for name, program in programs.items():
            if turn > 1 and spent[name][-1] > SLOW:
                continue
            begun = time.perf_counter()
            jax.block_until_ready(program(*operands))
            if turn:  # the first one touches memory for the first time
                spent[name].append(time.perf_counter() - begun)
    return {name: statistics.median(found) for name, found in spent.items()}


if __name__ == "__main__":
    run(main)
