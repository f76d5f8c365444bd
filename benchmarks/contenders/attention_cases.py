"""Attention of MLA's shape in several implementations: their errors and their times."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.model.attention import attention, plain_attention

QK, V = 192, 128
SCALE = 1 / math.sqrt(QK)
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
