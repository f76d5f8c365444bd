"""Trains in BF16, in BF16 with sums in another order, and in FP8; compares the loss curves.

    python experiments/fp8_vs_bf16/run.py [--folder FOLDER]

Runs that are in the folder already are not trained again; one that was stopped goes on. Writes
curves.png beside this file. 30 to 60 minutes on two CPU cores.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from curves import command, main_losses, relative_error, smoothed, train

from dsv3_jax.cli import run

VARIANTS = {
    "bf16": ("--quant.recipe", "bf16"),
    "bf16_sums": ("--quant.recipe", "bf16", "--train.microbatches", "2"),
    "fp8": ("--quant.recipe", "fp8"),
}
ERRORS = "largest", "largest after warm-up", "mean of the last half", "its mean magnitude"
WARM = 50  # steps, those of the warm-up, whose losses fall fast: told apart


def tell(folder: Path) -> None:
    """Trains what is missing, prints the table and draws the curves."""
    runs = {name: train(folder, name, *more) for name, more in VARIANTS.items()}
    heads = "run", "smoothed loss at the end", *(f"relative error, {of}" for of in ERRORS)
    print(f"| {' | '.join(heads)} |")
    print("|" + " --- |" * len(heads))
    for name, path in runs.items():
        error = 100 * relative_error(path, runs["bf16"])
        half = error[len(error) // 2 :]
        print(
            f"| `{name}` | {smoothed(main_losses(path))[-1]:.4f} | {np.abs(error).max():.3f} % "
            f"| {np.abs(error[WARM:]).max():.3f} % | {half.mean():+.3f} % "
            f"| {np.abs(half).mean():.3f} % |"
        )
    draw(runs, Path(__file__).with_name("curves.png"))


def draw(runs: dict[str, Path], path: Path) -> None:
    """Smoothed losses, and their relative distance from BF16's."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, run_folder in runs.items():
        left.plot(smoothed(main_losses(run_folder)), label=name, linewidth=1)
        if name != "bf16":
            right.plot(100 * relative_error(run_folder, runs["bf16"]), label=name, linewidth=1)
    left.set(xlabel="step", ylabel="main loss, nats per token, smoothed")
    right.set(xlabel="step", ylabel="relative error, %", ylim=(-2, 2))
    for bound in (-0.25, 0.25):
        right.axhline(bound, color="gray", linestyle="--", linewidth=0.8)
    left.legend()
    right.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run(command(tell, __doc__))
