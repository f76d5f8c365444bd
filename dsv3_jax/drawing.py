"""What all pictures of runs share: one style, colours, curves without noise, and files.

No picture follows the user's matplotlib settings, and equal entries give equal bytes.
"""

import io
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3_jax.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers too; the last three are ours.
BLUE, ORANGE, GREEN, PINK, AMBER, SKY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)
VIOLET, BROWN, SLATE = "#7A4FBF", "#8B5A2B", "#6E6E6E"
SERIES = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY, VIOLET, BROWN, SLATE)
GREY, GRID, EDGE = "#555555", "#E6E6E6", "#999999"

SMOOTHING = 0.015  # share of the entries over which the average of a curve fades to 1/e, each way
FORMATS = (".png", ".svg", ".pdf")
_SALT = "dsv3_jax"  # ids inside an SVG would otherwise be random
_STYLE = {
    "axes.edgecolor": EDGE,
    "axes.grid": True,
    "axes.labelcolor": GREY,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "font.size": 11,
    "grid.color": GRID,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "svg.hashsalt": _SALT,
    "text.parse_math": False,  # names of runs and layers may hold $
    "xtick.color": GREY,
    "ytick.color": GREY,
}


@contextmanager
def new_figure(
    width: float, height: float, layout: str | None = "constrained", **style: Any
) -> Iterator["Figure"]:
    """A figure of so many inches with our own settings, whatever the user's are, and without a
    word about fonts. `style` overrides matplotlib's rcParams.
    """
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)  # the font cache, built once, is announced by a warning
    try:
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_STYLE | style)
            # Made without pyplot: it draws by Agg, needs no display and leaves nothing open.
            yield Figure(figsize=(width, height), dpi=150, layout=layout)
    finally:
        logger.setLevel(level)


def save_picture(figure: "Figure", path: Path, option: str) -> None:
    """Writes a figure in the format of the path's suffix. ValueError for another suffix, OSError
    where it cannot be written; both name `option`, with which the user gave the path.
    """
    check_picture_path(path, option)
    data = io.BytesIO()
    undated = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    suffix = path.suffix.lower()
    figure.savefig(data, format=suffix[1:], metadata=undated[suffix])
    try:
        replace_file(path, data.getvalue())
    except OSError as error:
        raise OSError(f"{option} {path} cannot be written: {error.strerror}") from error


def check_picture_path(path: Path, option: str) -> None:
    """ValueError unless pictures can be written in the format that the suffix names."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{option} is {path}; allowed: a file that ends in {', '.join(FORMATS)}")


def short(number: float) -> str:
    """5.73M, 469B, 14.8T, as tokens are counted; small numbers as they are."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:g}"


def tokens_on_x(panel: "Axes", last_token: float) -> None:
    """The x axis counts tokens, from 0: 2M, 10T."""
    panel.xaxis.set_major_formatter(lambda tokens, _: short(tokens))
    panel.set_xlim(0, 1.02 * max(last_token, 1))


def column(entries: Sequence[dict[str, Any]], name: str) -> list[float]:
    """Values of one key; NaN, which leaves a gap, where an entry has no finite one."""
    values = (entry.get(name) for entry in entries)
    return [math.nan if v is None or not math.isfinite(v) else float(v) for v in values]


def smoothed(values: list[float]) -> list[float]:
    """Average with weights that fade exponentially to both sides, so that it does not lag behind.

    Values that are not finite have no weight and stay gaps (NaN).
    """
    before, after = _faded(values), _faded(values[::-1])[::-1]
    averages = []
    for value, (total_b, weight_b), (total_a, weight_a) in zip(values, before, after, strict=True):
        if math.isfinite(value):  # it is part of both sides
            averages.append((total_b + total_a - value) / (weight_b + weight_a - 1))
        else:
            averages.append(math.nan)
    return averages


def _faded(values: list[float]) -> list[tuple[float, float]]:
    """At each value, it and its predecessors summed with fading weights, and these weights' sum."""
    keep = math.exp(-1 / (SMOOTHING * max(1, len(values))))
    total = weight = 0.0
    sums = []
    for value in values:
        finite = math.isfinite(value)
        total = keep * total + (value if finite else 0.0)
        weight = keep * weight + finite
        sums.append((total, weight))
    return sums


def thinned(x: list[float], y: list[float], bins: int = 300) -> tuple[list[float], list[float]]:
    """At most two points of each of `bins` runs of neighbours, the lowest and the highest, so that
    a curve of any length stays small and no spike is lost. A gap stays where a whole run is one.
    """
    if len(x) <= 2 * bins:
        return x, y
    kept: list[int] = []
    for part in range(bins):
        places = range(part * len(x) // bins, (part + 1) * len(x) // bins)
        finite = [place for place in places if math.isfinite(y[place])]
        ends = {min(finite, key=y.__getitem__), max(finite, key=y.__getitem__)} if finite else ()
        kept += sorted(ends or {places[0]})
    return [x[place] for place in kept], [y[place] for place in kept]
