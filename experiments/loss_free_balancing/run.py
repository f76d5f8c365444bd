"""Experts balanced by an auxiliary loss, by a bias without a loss, and not at all.

    python experiments/loss_free_balancing/run.py [--folder FOLDER]

Runs that are in the folder already are not trained again; one that was stopped goes on. Writes
balance.png beside this file. 15 to 40 minutes on two CPU cores.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from balancing import BALANCING, RUNS, first_seeds, trained_runs
from curves import command, main_losses, smoothed
from routing import Balance, balance_of, held_out_choices, whole_validation

from dsv3_jax.cli import run
from dsv3_jax.drawing import SERIES, new_figure
from dsv3_jax.train.metrics import read_metrics

ROWS = 256  # of held-out text that loads are counted on
LAST = 100  # steps over which what is of single steps is averaged


class Outcome(NamedTuple):
    """Of a finished run: losses, validation being on the whole held-out split, and balance of the
    last steps, of the last half of the run, of held-out text.
    """

    validation_loss: float
    bits_per_byte: float
    training_loss: float
    of_a_step: float
    last: Balance
    held_out: Balance


def tell(folder: Path) -> None:
    """Trains what is missing, prints the table and draws the curves."""
    runs = trained_runs(folder, BALANCING)
    heads = (
        "run",
        "seed",
        "held-out loss, nats per token",
        "bits per byte",
        f"training loss, mean of the last {LAST} steps",
        f"MaxVio of a step, mean of the last {LAST}",
        "MaxVio of the last half's tokens together",
        "their smallest load over the mean",
        "MaxVio of held-out text",
    )
    print(f"| {' | '.join(heads)} |")
    print("|" + " --- |" * len(heads))
    for (name, seed), path in runs.items():
        print(line(name, seed, outcome(path)))
    draw(first_seeds(runs), Path(__file__).with_name("balance.png"))


def outcome(path: Path) -> Outcome:
    """Read from the run's metrics and counted with its model."""
    entries = read_metrics(path / "metrics.jsonl")
    whole, (_, chosen_LTE) = whole_validation(entries), held_out_choices(path, ROWS)
    held_out = balance_of(chosen_LTE.sum(1))
    steps = violations(path)[-LAST:].mean()
    # Loads since the validation in the middle of the run.
    last = [entry for entry in entries if entry["kind"] == "experts"][-1]
    last = balance_of(np.array(last["load_LE"]))
    losses = whole["loss"], whole["bits_per_byte"], float(main_losses(path)[-LAST:].mean())
    return Outcome(*losses, float(steps), last, held_out)


def violations(path: Path) -> np.ndarray:
    """MaxVio of every step's batch, mean of the MoE layers."""
    entries = read_metrics(path / "metrics.jsonl")
    return np.array([entry["max_violation"] for entry in entries if entry["kind"] == "train"])


def line(name: str, seed: int, of: Outcome) -> str:
    """Of the table."""
    return (
        f"| `{name}` | {seed} | {of.validation_loss:.4f} | {of.bits_per_byte:.4f} "
        f"| {of.training_loss:.4f} | {of.of_a_step:.3f} | {of.last.max_violation:.3f} "
        f"| {of.last.smallest:.3f} | {of.held_out.max_violation:.3f} |"
    )


def draw(runs: Mapping[str, Path], path: Path) -> None:
    """MaxVio of every step, and main loss over that of the first run, as running means."""
    with new_figure(10, 3.6, **{"lines.linewidth": 1.2}) as figure:
        left, right = figure.subplots(1, 2)
        baseline = smoothed(main_losses(next(iter(runs.values()))))
        for (name, run_folder), color in zip(runs.items(), SERIES, strict=False):
            left.plot(smoothed(violations(run_folder)), label=name, color=color)
            right.plot(smoothed(main_losses(run_folder)) - baseline, label=name, color=color)
        left.set(xlabel="step", ylabel="MaxVio, mean of the layers, smoothed", ylim=(0, None))
        right.set(xlabel="step", ylabel=f"main loss less {next(iter(runs))}'s, smoothed")
        left.legend()
        right.legend()
        figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run(command(tell, __doc__, RUNS))
