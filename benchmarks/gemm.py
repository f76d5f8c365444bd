"""Forms of the experts' grouped product on this device: forward, input and weight gradient.

    python benchmarks/gemm.py [--dtype bfloat16] [--experts 32] [--blocks 32 64 128 256]

One product of the routed experts of `bench_cpu`, 8 x 512 tokens with 4 experts each:

blocks   the model's (dsv3_jax/quant/gemm.py): a weight gathered for every block, one batched
         product; weight gradients of blocks summed by a one-hot product
scan     a loop over blocks, each with a slice of its expert's weight
ragged   `lax.ragged_dot` on copies in order of expert, without padding; on a CPU XLA makes it
         a masked product of every copy with every expert: E times the work
dense    every expert on every token, masked: E / K times the work

GFLOP/s count the useful products alone, neither padding nor masked ones. Copies fall on experts at
random, as after the initialisation. Rounds alternate; the median is printed, and its share of this
machine's square matmul peak in this dtype.

Expected: both forms over blocks ahead of ragged and dense, which do 32 and 8 times the work. Small
blocks read more weights, large ones pad more. About a minute on two cores.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from dsv3_jax.cli import parse, run
from dsv3_jax.config.fields import check
from dsv3_jax.config.presets import bench_cpu

if TYPE_CHECKING:
    import jax
    import numpy as np

PRODUCTS = ("forward", "input gradient", "weight gradient")


@dataclass(frozen=True)
class Options:
    """What is multiplied, and how often."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of rows and weights"""
    tokens: int = 4096
    """Before they are copied to their experts"""
    experts: int = 32
    """E, of which each token uses 4"""
    blocks: tuple[int, ...] = (32, 64, 128, 256)
    """Rows of a block"""
    rounds: int = 7
    """Alternating ones, after one that compiles"""

    def __post_init__(self) -> None:
        least = bench_cpu().experts_per_token
        check("--experts", self.experts, self.experts >= least, f"at least {least}")
        check("--rounds", self.rounds, self.rounds >= 1, "at least 1")


@dataclass
class Form:
    """One way to make the three products, and its seconds."""

    name: str
    products: dict[str, Callable[[], "jax.Array"]]
    seconds: dict[str, list[float]]


def main(args: Sequence[str]) -> None:
    """Prints one table."""
    options = parse(Options, Options(), prog="gemm.py", description=__doc__, args=args)
    from dsv3_jax.train.machine import describe, matmul_peak

    forms = [*block_forms(options), ragged(options), dense(options)]
    for form in forms:
        measure(form)
    for form in forms:
        form.seconds = {name: [] for name in PRODUCTS}
    for i in range(options.rounds):
        for k in range(len(forms)):
            measure(forms[(i + k) % len(forms)])
    peak, flops = matmul_peak(options.dtype), useful_flops(options)
    print(f"{describe()}; {options.dtype}; square matmul peak {peak / 1e9:,.0f} GFLOP/s\n")
    print(f"| {'form':<12} | {'product':<15} | {'ms':>8} | {'GFLOP/s':>8} | {'of peak':>8} |")
    print(f"| {'-' * 12} | {'-' * 15} | {'-' * 7}: | {'-' * 7}: | {'-' * 7}: |")
    for name in PRODUCTS:
        for form in forms:
            seconds = statistics.median(form.seconds[name])
            rate = flops / seconds
            print(
                f"| {form.name:<12} | {name:<15} | {seconds * 1e3:>8.1f} | {rate / 1e9:>8.1f} "
                f"| {rate / peak:>8.1%} |"
            )


def measure(form: Form) -> None:
    for name, run_once in form.products.items():
        begun = time.perf_counter()
        run_once().block_until_ready()
        form.seconds[name].append(time.perf_counter() - begun)


def useful_flops(options: Options) -> int:
    """Of each of the three products."""
    model = bench_cpu()
    copies = options.tokens * model.experts_per_token
    return 2 * copies * model.d_model * model.expert_hidden


def chosen(options: Options) -> "np.ndarray":
    """Distinct experts of every token at random, int [T, K]."""
    import numpy as np

    scores_TE = np.random.default_rng(0).random((options.tokens, options.experts))
    return np.argsort(scores_TE, axis=1)[:, : bench_cpu().experts_per_token]


def normal(options: Options, *shape: int) -> "jax.Array":
    import jax.numpy as jnp
    import numpy as np

    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), options.dtype)


def weights(options: Options) -> "jax.Array":
    """[E, D, F]."""
    model = bench_cpu()
    return normal(options, options.experts, model.d_model, model.expert_hidden)


def form_of(name: str, functions: Sequence[Callable], arguments: Sequence[Sequence]) -> Form:
    """Forward, input and weight gradient as compiled functions of arguments on the device."""
    import jax

    products = {
        kind: partial(jax.jit(function), *given)
        for kind, function, given in zip(PRODUCTS, functions, arguments, strict=True)
    }
    return Form(name, products, {kind: [] for kind in PRODUCTS})


def block_forms(options: Options) -> list[Form]:
    """Both forms over blocks, for every size of a block."""
    import jax.numpy as jnp
    import numpy as np

    model, w_EDF = bench_cpu(), weights(options)
    copies_E = np.bincount(chosen(options).reshape(-1), minlength=options.experts)
    forms = []
    for rows in options.blocks:
        # As many as suffice for every routing; what is left over belongs to the last expert.
        bound = (copies_E.sum() + options.experts * (rows - 1)) // rows
        expert_x = np.full(bound, options.experts - 1, np.int32)
        used = np.repeat(np.arange(options.experts), -(-copies_E // rows))
        expert_x[: len(used)] = used
        x_XD = normal(options, bound * rows, model.d_model)
        dy_XF = normal(options, bound * rows, model.expert_hidden)
        given = x_XD, w_EDF, jnp.asarray(expert_x), dy_XF
        forms += [blocks(rows, *given), scan(rows, *given)]
    return forms


def product(spec: str, a: "jax.Array", b: "jax.Array") -> "jax.Array":
    """Accumulated in float32, as the model has it."""
    import jax.numpy as jnp

    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def blocks(rows: int, x_XD, w_EDF, expert_x, dy_XF) -> Form:
    from dsv3_jax.quant.gemm import grouped_linear

    return differentiated(
        f"blocks {rows}", lambda x, w, e: grouped_linear(x, e, w), x_XD, w_EDF, dy_XF, expert_x
    )


def differentiated(name: str, grouped: Callable, x, w, dy, experts) -> Form:
    """Forward as it is, gradients as its own derivative rule has them."""
    import jax

    def dx(x, w, experts, dy):
        return jax.vjp(lambda x: grouped(x, w, experts), x)[1](dy)[0]

    def dw(x, w, experts, dy):
        return jax.vjp(lambda w: grouped(x, w, experts), w)[1](dy)[0]

    given = x, w, experts, dy
    return form_of(name, (grouped, dx, dw), (given[:3], given, given))


def scan(rows: int, x_XD, w_EDF, expert_x, dy_XF) -> Form:
    import jax.numpy as jnp
    from jax import lax

    x_xMD, dy_xMF = (a.reshape(len(expert_x), rows, -1) for a in (x_XD, dy_XF))

    def forward(x_xMD, w_EDF, expert_x):
        def one(block):
            x_MD, e = block
            return product("md,df->mf", x_MD, w_EDF[e]).astype(x_MD.dtype)

        return lax.map(one, (x_xMD, expert_x))

    def dx(dy_xMF, w_EDF, expert_x):
        def one(block):
            dy_MF, e = block
            return product("mf,df->md", dy_MF, w_EDF[e]).astype(dy_MF.dtype)

        return lax.map(one, (dy_xMF, expert_x))

    def dw(x_xMD, dy_xMF, w_EDF, expert_x):
        def add(dw_EDF, block):
            x_MD, dy_MF, e = block
            return dw_EDF.at[e].add(product("md,mf->df", x_MD, dy_MF)), None

        zeros_EDF = jnp.zeros(w_EDF.shape, jnp.float32)
        return lax.scan(add, zeros_EDF, (x_xMD, dy_xMF, expert_x))[0]

    given = (x_xMD, w_EDF, expert_x), (dy_xMF, w_EDF, expert_x), (x_xMD, dy_xMF, w_EDF, expert_x)
    return form_of(f"scan {rows}", (forward, dx, dw), given)


def ragged(options: Options) -> Form:
    import jax.numpy as jnp
    import numpy as np
    from jax import lax

    model = bench_cpu()
    copies_E = np.bincount(chosen(options).reshape(-1), minlength=options.experts)
    x_JD = normal(options, copies_E.sum(), model.d_model)
    dy_JF = normal(options, copies_E.sum(), model.expert_hidden)
    sizes_E = jnp.asarray(copies_E, jnp.int32)
    return differentiated("ragged", lax.ragged_dot, x_JD, weights(options), dy_JF, sizes_E)


def dense(options: Options) -> Form:
    """Masked are the outputs, and their gradient on its way back."""
    import jax.numpy as jnp
    import numpy as np

    model, w_EDF = bench_cpu(), weights(options)
    mask_ET = np.zeros((options.experts, options.tokens), bool)
    mask_ET[chosen(options).T, np.arange(options.tokens)[None]] = True
    mask_ET1 = jnp.asarray(mask_ET)[..., None]
    x_TD = normal(options, options.tokens, model.d_model)
    dy_ETF = normal(options, options.experts, options.tokens, model.expert_hidden)

    def forward(x_TD, w_EDF, mask_ET1):
        return jnp.where(mask_ET1, product("td,edf->etf", x_TD, w_EDF), 0).astype(x_TD.dtype)

    def dx(dy_ETF, w_EDF, mask_ET1):
        dy_ETF = jnp.where(mask_ET1, dy_ETF, 0)
        return product("etf,edf->td", dy_ETF, w_EDF).astype(dy_ETF.dtype)

    def dw(x_TD, dy_ETF, mask_ET1):
        return product("td,etf->edf", x_TD, jnp.where(mask_ET1, dy_ETF, 0))

    given = ((x_TD, w_EDF, mask_ET1), (dy_ETF, w_EDF, mask_ET1), (x_TD, dy_ETF, mask_ET1))
    return form_of("dense", (forward, dx, dw), given)


if __name__ == "__main__":
    run(main)
