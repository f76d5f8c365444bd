"""Scores by depth and length: the picture, a Markdown table, lines for a terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dsv3_jax.drawing import GREEN, ORANGE, new_figure
from dsv3_jax.evaluate.needle_scores import Cell, Score, mean_score
from dsv3_jax.evaluate.needles import Place

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {
    "exact": "needles found",
    "tokens": "tokens of the answer that are the likeliest",
    "logprob": "mean log-probability of the answer's tokens, nats",
}
# Hues that colour-blind readers tell apart, with a light middle.
COLOURS = (ORANGE, "#F4E3B2", GREEN)


class Map:
    """Cells as a grid.

    Attributes:
        lengths: in tokens, ascending.
        depths: 0 to 1, ascending.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.lengths = sorted({cell.place.length for cell in cells})
        self.depths = sorted({cell.place.depth for cell in cells})
        self._score_of = {cell.place: cell.score for cell in cells}

    def row(self, depth: float) -> list[Score]:
        """Scores at a depth, one for each length."""
        return [self._score_of[Place(length, depth)] for length in self.lengths]

    def means(self) -> list[Score]:
        """Over the depths, one for each length."""
        rows = [self.row(depth) for depth in self.depths]
        return [mean_score(column) for column in zip(*rows, strict=True)]

    def values(self, field: str) -> np.ndarray:
        """A field of all scores, [depths, lengths]."""
        return np.array([[getattr(s, field) for s in self.row(depth)] for depth in self.depths])


def markdown(found: Map, field: str) -> str:
    """A table: a line for each depth, a column for each length, and the means."""
    heads = ["depth", *(f"{length:,}" for length in found.lengths)]
    lines = [(f"{depth:.0%}", found.row(depth)) for depth in found.depths]
    lines.append(("mean", found.means()))
    return "\n".join(
        [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
        + [f"| {name} | {' | '.join(shown(s, field) for s in row)} |" for name, row in lines]
    )


def terminal(found: Map, field: str) -> str:
    """The same for a terminal."""
    lines = [("depth", [f"{length:,}" for length in found.lengths])]
    named = [*((f"{depth:.0%}", found.row(depth)) for depth in found.depths)]
    for name, row in [*named, ("mean", found.means())]:
        lines.append((name, [shown(score, field) for score in row]))
    return "\n".join(f"{name:>6}" + "".join(f"{x:>10}" for x in row) for name, row in lines)


def shown(score: Score, field: str) -> str:
    """A field as tables have it: shares in percent, log-probabilities as they are."""
    value = getattr(score, field)
    return f"{value:.2f}" if field == "logprob" else f"{value:.0%}"


def picture(found: Map, title: str) -> "Figure":
    """The share of needles found, depth by length."""
    height = 1.6 + 0.32 * len(found.depths)
    with new_figure(2.2 + 0.85 * len(found.lengths), height, **{"axes.grid": False}) as figure:
        panel = figure.subplots()
        draw_map(panel, found, "exact")
        panel.set_title(title)
    return figure


def draw_map(panel: "Axes", found: Map, field: str) -> None:
    """One panel of shares from 0 to 1: orange is none, green is all."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("found", COLOURS)
    values = found.values(field)
    panel.imshow(values, cmap=colours, vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        panel.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=8)
    panel.set_xticks(range(len(found.lengths)), [f"{length:,}" for length in found.lengths])
    panel.set_yticks(range(len(found.depths)), [f"{depth:.0%}" for depth in found.depths])
    panel.set(xlabel="length of the prompt, tokens", ylabel="depth of the needle")
