"""Which experts work on which kind of text, in models balanced by a loss and without one.

    python experiments/expert_specialisation/run.py [--folder FOLDER]

Takes the runs of loss_free_balancing from the folder, or trains them. Writes experts.png beside
this file. Minutes on two CPU cores beside the training.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from balancing import BALANCING, RUNS, first_seeds, trained_runs
from curves import command
from kinds_of_text import KINDS, rows_of
from routing import Trained, choices, relative, some, trained

from dsv3_jax.cli import run
from dsv3_jax.data.packing import Row
from dsv3_jax.drawing import new_figure

ROWS = 128  # of each kind, and of each part of the source
BRIGHTEST = 3.0  # times the mean; more is drawn alike

PARTS = 3  # of the source, as many as kinds: they differ by chance alone


class Outcome(NamedTuple):
    """Of a run: relative load on each kind of text, and on three parts of the source."""

    kinds: dict[str, np.ndarray]
    parts: list[np.ndarray]


def tell(folder: Path) -> None:
    """Trains what is missing, prints the table and draws the heat maps."""
    runs = trained_runs(folder, BALANCING)
    found = {key: outcome(trained(path)) for key, path in runs.items()}
    heads = "run", "seed", "deviation between kinds", "between parts of the source"
    heads += tuple(f"largest relative load, {kind}" for kind in KINDS)
    print(f"| {' | '.join(heads)} |")
    print("|" + " --- |" * len(heads))
    for (name, seed), of in found.items():
        largest = " | ".join(f"{load_LE.max():.2f}" for load_LE in of.kinds.values())
        print(
            f"| `{name}` | {seed} | {deviation(list(of.kinds.values())):.3f} "
            f"| {deviation(of.parts):.3f} | {largest} |"
        )
    draw(first_seeds(found), Path(__file__).with_name("experts.png"))


def outcome(of: Trained) -> Outcome:
    """Counted with a run's model."""

    def load(rows: Sequence[Row]) -> np.ndarray:
        return relative(choices(of.model, rows, of.cfg.train.dtype).sum(1))

    rows = {kind: rows_of(pattern, of) for kind, pattern in KINDS.items()}
    source = some(rows["source"], PARTS * ROWS)
    parts = [load(source[start::PARTS]) for start in range(PARTS)]
    return Outcome({kind: load(some(of_kind, ROWS)) for kind, of_kind in rows.items()}, parts)


def deviation(loads: Sequence[np.ndarray]) -> float:
    """Mean distance of a relative load [L, E] from its mean over the kinds: 0 where experts do not
    tell kinds apart.
    """
    load_KLE = np.stack(loads)
    return float(np.abs(load_KLE - load_KLE.mean(0, keepdims=True)).mean())


def draw(found: Mapping[str, Outcome], path: Path) -> None:
    """Heat maps, kinds of text downwards and experts to the right, a row of them for each layer."""
    layers = len(next(iter(next(iter(found.values())).kinds.values())))
    with new_figure(11, 1.1 * layers + 0.9, **{"axes.grid": False, "font.size": 8}) as figure:
        panels = figure.subplots(layers, len(found), squeeze=False, sharex=True, sharey=True)
        for column, (name, of) in zip(panels.T, found.items(), strict=True):
            column[0].set_title(name, fontsize=10)
            column[-1].set_xlabel("expert")
            for layer, panel in enumerate(column):
                load_KE = np.stack([load_LE[layer] for load_LE in of.kinds.values()])
                image = panel.imshow(load_KE, vmin=0, vmax=BRIGHTEST, aspect="auto", cmap="viridis")
                panel.set_yticks(range(len(of.kinds)), of.kinds)
        for layer, panel in enumerate(panels[:, 0], start=1):
            panel.set_ylabel(f"MoE layer {layer}")
        figure.colorbar(image, ax=panels, label="load over the mean", extend="max")
        figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run(command(tell, __doc__, RUNS))
