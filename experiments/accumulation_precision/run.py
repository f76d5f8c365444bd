"""How much of a long sum an FP8 tensor core's 14 bits lose, and what promotion saves.

    python experiments/accumulation_precision/run.py

Random GEMMs with K = 4096 through the emulated accumulator; half a minute on two CPU cores.
"""

import itertools
import sys
from dataclasses import replace

import jax
import numpy as np

from dsv3_jax.cli import parse, run
from dsv3_jax.quant.accumulator import Accumulator, emulated_matmul
from dsv3_jax.quant.fp8 import fake_quantize

K, M = 4096, 64
SEEDS = range(5)
INTERVALS = (None, 512, 256, 128, 64)
WIDER = (15, 16, 17, 18)  # bits; float32 holds a group's sum exactly up to 18


def main(args: list[str]) -> None:
    """Prints the tables."""
    parse(tuple[()], (), prog="run.py", description=__doc__, args=args)
    for signs, aligned in itertools.product(("both signs", "one sign"), (True, False)):
        operands = [draw(seed, signs) for seed in SEEDS]
        where = "in" if aligned else "out of"
        print(f"\nOperands of {signs}, register {where} the alignment\n")
        print("| bits, promotion | largest error, median of 5 seeds | range | RMS error |")
        print("| --- | --- | --- | --- |")
        plain = replace(Accumulator(), aligned=aligned)
        accumulators = [replace(plain, interval=interval) for interval in INTERVALS]
        # Each bit more for a sum of twice as many products.
        accumulators += [replace(plain, bits=b, interval=128 * 2 ** (b - 14)) for b in WIDER]
        for acc in accumulators:
            print(row(acc, operands))


def row(acc: Accumulator, operands: list[list[np.ndarray]]) -> str:
    """Of a table."""
    matmul = jax.jit(emulated_matmul, static_argnums=2)
    largest, typical = zip(*(errors(matmul, *pair, acc) for pair in operands), strict=True)
    promoted = "none" if acc.interval is None else f"N_C = {acc.interval}"
    return (
        f"| {acc.bits}, {promoted} | {np.median(largest):.3f} % | {min(largest):.3f} to "
        f"{max(largest):.3f} % | {np.median(typical):.4f} % |"
    )


def draw(seed: int, signs: str) -> list[np.ndarray]:
    """Standard normal operands or their magnitudes, in E4M3 with one scale."""
    generator, operands = np.random.default_rng(seed), []
    for shape in ((M, K), (K, M)):
        x = generator.standard_normal(shape).astype("f4")
        x = np.abs(x) if signs == "one sign" else x
        operands.append(np.asarray(fake_quantize(x, shape, scale="pow2")))
    return operands


def errors(matmul, a: np.ndarray, b: np.ndarray, acc: Accumulator) -> tuple[float, float]:
    """Largest and RMS error in % of the RMS of the exact result."""
    exact = a.astype(float) @ b.astype(float)
    error = (np.asarray(matmul(a, b, acc), float) - exact) / np.sqrt(np.mean(exact**2))
    return 100 * np.abs(error).max(), 100 * np.sqrt(np.mean(error**2))


if __name__ == "__main__":
    sys.exit(run(main))
