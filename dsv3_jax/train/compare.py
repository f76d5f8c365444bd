"""`python -m dsv3_jax.train.compare`: loss curves of runs over each other, by consumed tokens.

All runs are put on one grid, every token count that any of them logged within the range they share.
There each loss is averaged with weights that fade into the past (EMA), the same for all runs:
logging intervals and batch sizes may differ. The relative difference is to the run named first.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import tyro
from rich.console import Console
from rich.table import Table

from dsv3_jax.cli import parse, run, user_errors
from dsv3_jax.config import OutputConfig
from dsv3_jax.drawing import check_picture_path, short
from dsv3_jax.train.folder import RunFolder
from dsv3_jax.train.metrics import read_metrics

if TYPE_CHECKING:
    import numpy as np

PROG = "python -m dsv3_jax.train.compare"
DESCRIPTION = """Compare training runs by their loss curves.

Draws the averaged main loss of each run over consumed tokens and prints, where all runs have been:
the averaged loss, its relative difference to the first run, the largest difference on the way, and
bits per byte of the nearest validation.
"""
SMOOTHING_SHARE = 0.05  # of the shared range, where no --smoothing is given


@dataclass(frozen=True)
class Options:
    """What to compare."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders of runs, or their names in runs/; the others are compared with the first"""
    out: Path = Path("compare.png")
    """The picture: .png, .svg or .pdf"""
    smoothing: Annotated[int | None, tyro.conf.arg(metavar="TOKENS")] = None
    """Tokens over which an entry's weight fades to 1/e; by default 5% of what all runs share"""


class LossCurve(NamedTuple):
    """A run's entries with a finite main loss by consumed tokens, and its validations."""

    name: str
    tokens_N: "np.ndarray"
    loss_N: "np.ndarray"
    validations: list[tuple[int, float]]  # tokens, bits per byte


class Compared(NamedTuple):
    """Runs on their common grid of N token counts."""

    curves: list[LossCurve]
    tokens_N: "np.ndarray"
    averages: list["np.ndarray"]  # of the main loss, each [N]
    smoothing: float

    def difference(self, place: int) -> "np.ndarray":
        """Relative difference of a run's averaged loss to the first run's, [N]."""
        return self.averages[place] / self.averages[0] - 1


def main(args: Sequence[str]) -> int:
    """The command. Returns the exit code; SystemExit 2 for the user's mistakes."""
    with user_errors():
        options = parse(Options, Options(), prog=PROG, description=DESCRIPTION, args=args)
        check_picture_path(options.out, "--out")
        runs = _checked(options).runs
        curves = _told_apart([read_curve(wanted) for wanted in runs], runs)
        compared = compare(curves, options.smoothing)
        draw(compared, options.out)
    print_table(compared, options.out)
    return 0


def _checked(options: Options) -> Options:
    if len(options.runs) < 2:
        found = options.runs[0] if options.runs else "none"
        raise ValueError(f"runs to compare: found {found}; allowed: two or more")
    if options.smoothing is not None and options.smoothing < 1:
        raise ValueError(f"--smoothing is {options.smoothing}; allowed: at least 1 token")
    return options


def _told_apart(curves: list[LossCurve], wanted: Sequence[str]) -> list[LossCurve]:
    """Runs of one name in different folders are called as they were asked for."""
    counted = Counter(curve.name for curve in curves)
    return [
        curve if counted[curve.name] == 1 else curve._replace(name=given)
        for curve, given in zip(curves, wanted, strict=True)
    ]


def read_curve(wanted: str) -> LossCurve:
    """The curve of a run's folder, or of the run of that name in runs/.

    ValueError if there is no such run, or nothing to compare in it.
    """
    import numpy as np

    metrics = _metrics_of(wanted)
    entries = read_metrics(metrics)
    points = {
        entry["tokens"]: entry["main_loss"]  # of two entries at one place the later counts
        for entry in entries
        if entry["kind"] == "train" and entry.get("main_loss") is not None and "tokens" in entry
    }
    if not points:
        raise ValueError(f"{metrics}: no training entry with a finite loss; allowed: at least one")
    tokens = sorted(points)
    validations = [
        (entry["tokens"], entry["bits_per_byte"])
        for entry in entries
        if entry["kind"] == "validation" and entry.get("bits_per_byte") is not None
    ]
    loss_N = np.array([points[place] for place in tokens], np.float64)
    return LossCurve(metrics.parent.name, np.array(tokens, np.float64), loss_N, validations)


def _metrics_of(wanted: str) -> Path:
    for path in (Path(wanted), Path(OutputConfig().folder) / wanted):
        run_folder = RunFolder(path.resolve())
        if run_folder.metrics.is_file():
            return run_folder.metrics
        if run_folder.config.is_file():
            raise ValueError(f"{path}: this run has no entries yet (no metrics.jsonl)")
    raise ValueError(f"{wanted}: no such run; allowed: a run's folder, or its name in runs/")


def compare(curves: list[LossCurve], smoothing: float | None) -> Compared:
    """All runs on one grid, averaged. ValueError if they share no range of tokens."""
    import numpy as np

    begin = max(curve.tokens_N[0] for curve in curves)
    end = min(curve.tokens_N[-1] for curve in curves)
    if begin >= end:
        ranges = "; ".join(
            f"{curve.name} {curve.tokens_N[0]:,.0f} to {curve.tokens_N[-1]:,.0f}"
            for curve in curves
        )
        raise ValueError(f"the runs share no range of tokens: found {ranges}")
    every = np.unique(np.concatenate([curve.tokens_N for curve in curves]))
    tokens_N = every[(every >= begin) & (every <= end)]
    smoothing = smoothing or SMOOTHING_SHARE * (end - begin)
    averages = [
        faded_average(tokens_N, np.interp(tokens_N, curve.tokens_N, curve.loss_N), smoothing)
        for curve in curves
    ]
    return Compared(curves, tokens_N, averages, smoothing)


def faded_average(tokens_N: "np.ndarray", values_N: "np.ndarray", smoothing: float) -> "np.ndarray":
    """At each place the mean of all values up to it, weighted by exp(-distance / smoothing)."""
    import numpy as np

    keeps = np.exp(-np.diff(tokens_N, prepend=tokens_N[0]) / smoothing)
    total = weight = 0.0
    averages = []
    for keep, value in zip(keeps.tolist(), values_N.tolist(), strict=True):
        total, weight = keep * total + value, keep * weight + 1.0
        averages.append(total / weight)
    return np.array(averages)


def draw(compared: Compared, path: Path) -> None:
    """The averaged losses over each other, and below them the differences to the first run."""
    from dsv3_jax.drawing import SERIES, new_figure, save_picture, tokens_on_x

    with new_figure(9, 6.5) as figure:
        losses, differences = figure.subplots(2, 1, height_ratios=(3, 2), sharex=True)
        for place, curve in enumerate(compared.curves):
            color = SERIES[place % len(SERIES)]
            losses.plot(curve.tokens_N, curve.loss_N, color=color, alpha=0.25, linewidth=0.8)
            look = {"color": color, "linewidth": 1.6, "label": curve.name}
            losses.plot(compared.tokens_N, compared.averages[place], **look)
            differences.plot(compared.tokens_N, 100 * compared.difference(place), **look)
        losses.set_title(f"Main loss, nats per token (EMA over {short(compared.smoothing)} tokens)")
        losses.legend()
        differences.set_title(f"Difference to {compared.curves[0].name}, %")
        differences.set_xlabel("consumed tokens")
        tokens_on_x(differences, compared.tokens_N[-1])
        save_picture(figure, path, "--out")


def print_table(compared: Compared, path: Path) -> None:
    """One line a run, at the last token count that all runs share."""
    import numpy as np

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    last = compared.tokens_N[-1]
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for name in ("loss", "difference", "largest", "at tokens", "bits/byte", "at tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for place, curve in enumerate(compared.curves):
        differences_N = compared.difference(place)
        largest = int(np.argmax(np.abs(differences_N)))
        cells = [
            f"{differences_N[-1]:+.2%}",
            f"{differences_N[largest]:+.2%}",
            short(compared.tokens_N[largest]),
        ]
        table.add_row(
            curve.name,
            f"{compared.averages[place][-1]:.4f}",
            *(cells if place else ("", "", "")),
            *_nearest(curve.validations, last),
        )
    console.print(
        f"main loss, EMA over {short(compared.smoothing)} tokens, after {last:,.0f} tokens"
    )
    console.print(table)
    console.print(f"picture {path}")


def _nearest(validations: list[tuple[int, float]], tokens: float) -> tuple[str, str]:
    """Bits per byte of the validation nearest to a place, and where that was."""
    if not validations:
        return "-", ""
    place, value = min(validations, key=lambda point: abs(point[0] - tokens))
    return (f"{value:.3f}" if math.isfinite(value) else "-"), short(place)


if __name__ == "__main__":
    run(main)
