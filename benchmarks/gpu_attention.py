"""Causal attention of MLA's shape on one GPU: this project's chunks beside cuDNN and tokamax.

    python benchmarks/gpu_attention.py [--rows 1 4] [--length 4096] [--heads 16] [--seconds 120]

Heads of 192 (queries and keys) and 128 (values), bfloat16, forward and backward. First each
variant's output and gradients are held against float32 softmax of one short row; then all are timed
by turns. cuDNN comes with jax[cuda13], as `jax.nn` offers it (values filled up to 192) and through
JAX's own module below that, which takes 128; tokamax is had by `pip install tokamax`.

Expected: a line of errors for each variant, and a line of times for each number of rows; what is
not installed, or not for this machine, is said and left out. Without a GPU it says so in one line
and ends, unless --length is at most 512.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the package is not installed

from contenders import command_line

from dsv3_jax.cli import fail, run

PEAK = 989.4e12  # of the H100 and H200, dense BF16
WITHOUT_A_GPU = 512  # tokens that take a CPU no more than seconds


def parsed(args: Sequence[str]) -> argparse.Namespace:
    """Exits 0 after --help, 2 after a mistake."""
    parser = command_line.parser("gpu_attention.py", __doc__)
    add = parser.add_argument
    add(
        "--rows", type=int, nargs="+", default=[1, 4], help="rows of a batch, each number by itself"
    )
    add("--length", type=int, default=4096, help="tokens of a row")
    add("--heads", type=int, default=16, help="heads of a row")
    add("--seconds", type=float, default=120, help="seconds after which no more is timed")
    add("--turns", type=int, default=5, help="turns of each variant")
    options = command_line.parsed(parser, args)
    for name, least in (("length", 128), ("heads", 1), ("turns", 1)):
        if getattr(options, name) < least:
            fail(f"--{name} is {getattr(options, name)}; allowed: at least {least}")
    if min(options.rows) < 1:
        fail(f"--rows is {min(options.rows)}; allowed: at least 1")
    return options


def main(args: Sequence[str]) -> None:
    """Prints errors, then times."""
    options, begun = parsed(args), time.perf_counter()
    import jax
    from contenders.attention_cases import QK, V, inputs, timed, usable, with_gradients

    if jax.default_backend() == "cpu" and options.length > WITHOUT_A_GPU:
        print(f"skipped: JAX finds no GPU; a CPU takes --length up to {WITHOUT_A_GPU}")
        return
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, peak {PEAK / 1e12:,.1f} TFLOP/s")
    good = usable(options.length)
    for rows in options.rows:
        if time.perf_counter() - begun > options.seconds:
            print(f"{rows} rows: left out, --seconds {options.seconds:g} are over")
            continue
        operands = inputs(rows, options.length, options.heads)
        forward = timed({n: jax.jit(f) for n, f in good.items()}, operands[:3], options.turns)
        whole = timed({n: with_gradients(f) for n, f in good.items()}, operands, options.turns)
        flops = rows * options.heads * options.length**2 * (QK + V)  # of the causal half
        for name in good:
            parts = (("forward", forward[name], 1), ("with backward", whole[name], 3))
            told = ", ".join(
                f"{part} {t * 1e3:,.3f} ms, {times * flops / t / 1e12:,.0f} TFLOP/s "
                f"({times * flops / t / PEAK:.0%})"
                for part, t, times in parts
            )
            print(f"{rows} x {options.length} x {options.heads} heads, {name}: {told}", flush=True)


if __name__ == "__main__":
    run(main)
