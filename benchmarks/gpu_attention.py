"""Causal attention of MLA's shape on one GPU: this project's chunks beside cuDNN and tokamax.

    python benchmarks/gpu_attention.py [--rows 1 4] [--length 4096] [--heads 16] [--seconds 120]

Heads of 192 (queries and keys) and 128 (values), bfloat16, forward and backward. First each
variant's output and gradients are held against float32 softmax of one short row; then all are timed
by turns. cuDNN comes with jax[cuda13], as `jax.nn` offers it (values filled up to 192) and through
JAX's own module below that, which takes 128; tokamax is had by `pip install tokamax`.

Expected: a line of errors for each variant, and a line of times for each number of rows; what is
not installed, or not for this machine, is said and left out.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the package is not installed

import jax
import jax.numpy as jnp
import numpy as np
from contenders import command_line

from dsv3_jax.cli import fail, run
from dsv3_jax.model.attention import attention, plain_attention

QK, V = 192, 128
SCALE = 1 / math.sqrt(QK)
PEAK = 989.4e12  # of the H100 and H200, dense BF16
SHORT = 1024  # tokens of the row that errors are taken from
CALLS = 5  # of a turn


def padded_cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    v = jnp.pad(v, ((0, 0),) * 3 + ((0, QK - V),))
    o = jax.nn.dot_product_attention(q, k, v, scale=SCALE, is_causal=True, implementation="cudnn")
    return o[..., :V]


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`jax.nn` asks for heads of one size; what it calls does not (cuDNN 9.10 or later)."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    return dot_product_attention(q, k, v, scale=SCALE, mask_type=MaskType.CAUSAL)


def tokamax(kind: str, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    from tokamax import dot_product_attention

    return dot_product_attention(q, k, v, scale=SCALE, is_causal=True, implementation=kind)


VARIANTS: Mapping[str, Callable[..., jax.Array]] = {
    "chunks": partial(attention, scale=SCALE),
    "cuDNN, values filled up": padded_cudnn,
    "cuDNN": cudnn,
    "tokamax, Mosaic": partial(tokamax, "mosaic"),
    "tokamax, Triton": partial(tokamax, "triton"),
}


def parsed(args: Sequence[str]) -> argparse.Namespace:
    """Exits 0 after --help, 2 after a mistake."""
    parser = command_line.parser("gpu_attention.py", __doc__)
    add = parser.add_argument
    add("--rows", type=int, nargs="+", default=[1, 4], help="of a product")
    add("--length", type=int, default=4096, help="tokens of a row")
    add("--heads", type=int, default=16)
    add("--seconds", type=float, default=120, help="after which no more is timed")
    add("--turns", type=int, default=5, help="of each variant")
    options = command_line.parsed(parser, args)
    for name, least in (("length", 128), ("heads", 1), ("turns", 1)):
        if getattr(options, name) < least:
            fail(f"--{name} is {getattr(options, name)}; allowed: at least {least}")
    if min(options.rows) < 1:
        fail(f"--rows is {min(options.rows)}; allowed: at least 1")
    return options


def inputs(rows: int, length: int, heads: int, seed: int = 0) -> list[jax.Array]:
    """Queries, keys, values, and the output's gradient."""
    draw = np.random.default_rng(seed)
    shapes = [(rows, length, heads, size) for size in (QK, QK, V, V)]
    return [jnp.asarray(draw.standard_normal(x, np.float32), jnp.bfloat16) for x in shapes]


def with_gradients(function: Callable[..., jax.Array]) -> Callable:
    @jax.jit
    def both(q, k, v, do):
        o, pull = jax.vjp(function, q, k, v)
        return (o, *pull(do.astype(o.dtype)))

    return both


def exact(args: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """In float32 at the highest precision."""
    with jax.default_matmul_precision("highest"):
        wide = (x.astype(jnp.float32) for x in args)
        return with_gradients(partial(plain_attention, scale=SCALE))(*wide)


def usable(length: int) -> dict[str, Callable]:
    """The variants that run here, whose errors it prints."""
    args, good = inputs(1, min(length, SHORT), 2), {}
    wanted = exact(args)
    for name, function in VARIANTS.items():
        try:
            found = with_gradients(function)(*args)
            errors = [relative_error(a, b) for a, b in zip(found, wanted, strict=True)]
        except Exception as error:  # whatever a library says of this machine
            why = str(error).splitlines() or [""]
            print(f"{name}: left out, {type(error).__name__}: {why[0][:160]}", flush=True)
            continue
        print(
            f"{name}: relative errors of o, dq, dk, dv", *(f"{x:.1e}" for x in errors), flush=True
        )
        good[name] = function
    return good


def relative_error(actual: jax.Array, expected: jax.Array) -> float:
    a, b = (np.asarray(x.astype(jnp.float32)) for x in (actual, expected))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def timed(functions: Mapping[str, Callable], args: Sequence[jax.Array], turns: int) -> dict:
    """Median seconds of a call of each, by turns."""
    for function in functions.values():
        jax.block_until_ready(function(*args))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(turns):
        for name, function in functions.items():
            begun = time.perf_counter()
            jax.block_until_ready([function(*args) for _ in range(CALLS)])
            seconds[name].append((time.perf_counter() - begun) / CALLS)
    return {name: statistics.median(each) for name, each in seconds.items()}


def main(args: Sequence[str]) -> None:
    """Prints errors, then times."""
    options, begun = parsed(args), time.perf_counter()
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
