"""What each number format loses of the tensors of a real run.

    python experiments/formats/run.py --run FOLDER [--step N]

The run is one of fp8_vs_bf16, of which `bf16` is meant. A minute on two CPU cores.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from captured import tensors, trained

from dsv3_jax.cli import parse, run, user_errors
from dsv3_jax.quant.formats import format_of
from dsv3_jax.quant.recipes import ROW, SQUARE, Operand


def centred(fmt: str) -> Callable:
    """One power of two that brings the RMS near 1, where a tapered format is most precise."""

    def cast(x: jax.Array) -> jax.Array:
        power = jnp.exp2(jnp.round(jnp.log2(jnp.sqrt(jnp.mean(jnp.square(x))))))
        return format_of(fmt).round(x / power) * power

    return cast


FORMATS: dict[str, Callable] = {
    "E4M3, one scale": Operand(None).fake_quantize,
    "E5M2, one scale": Operand(None, "e5m2").fake_quantize,
    "E4M3, 1x128": Operand(ROW).fake_quantize,
    "E4M3, 1x128, powers of two": Operand(ROW, scale="pow2").fake_quantize,
    "E4M3, 128x128": Operand(SQUARE).fake_quantize,
    "MXFP8: E4M3, 1x32, E8M0": Operand((1, 32), scale="mx").fake_quantize,
    "HiFloat8, no scale": format_of("hif8").round,
    "HiFloat8, one power of two": centred("hif8"),
    "E5M6, 1x128, powers of two": Operand(ROW, "e5m6", "pow2").fake_quantize,
}


@dataclass(frozen=True)
class Options:
    """Whose tensors."""

    run: Path = Path("runs/fp8_vs_bf16/bf16-001")
    """Folder of a run"""
    step: int | None = None
    """Of its checkpoints; default: the newest"""


def main(args: list[str]) -> None:
    """The command."""
    options = parse(Options, Options(), prog="run.py", description=__doc__, args=args)
    with user_errors():
        tell(options)


def tell(options: Options) -> None:
    """Prints a table for each kind of tensor."""
    if not (options.run / "config.json").exists():
        raise ValueError(f"{options.run} is no run; allowed: one of fp8_vs_bf16, trained before")
    found = tensors(trained(options.run, options.step))
    for kind in ("input", "weight", "gradient"):
        matrices = [m for of in found.values() for m in _matrices(np.asarray(getattr(of, kind)))]
        print(f"\n### {kind}s ({len(matrices)} matrices)\n")
        print("| format | relative error, median | worst | numbers that became 0, median | worst |")
        print("| --- | --- | --- | --- | --- |")
        for name, cast in FORMATS.items():
            error, zeros = zip(*(_lost(jax.jit(cast), m) for m in matrices), strict=True)
            print(
                f"| {name} | {np.median(error):.2%} | {max(error):.2%} | {np.median(zeros):.3%} "
                f"| {max(zeros):.2%} |"
            )


def _matrices(x: np.ndarray) -> list[np.ndarray]:
    """Of every layer, and of one expert in eight. Rows of zeros, empty slots, are left out."""
    matrices = x.reshape(-1, *x.shape[-2:])
    matrices = matrices[::8] if len(matrices) > 8 else matrices
    rows = [m[np.abs(m).max(1) > 0] for m in matrices]
    return [m[: len(m) // 128 * 128] if len(m) >= 128 else m for m in rows if m.size]


def _lost(cast: Callable, x: np.ndarray) -> tuple[float, float]:
    """Norm of the error over the norm, and the share of what is 0 only afterwards."""
    y, counts = np.asarray(cast(x), float), np.abs(x) > 1e-30
    error = np.linalg.norm(y - x) / np.linalg.norm(x.astype(float))
    return float(error), float((counts & (y == 0)).sum() / counts.sum())


if __name__ == "__main__":
    run(main)
