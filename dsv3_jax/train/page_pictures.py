"""Curves of a run's page as SVG that goes into HTML: its colours are the page's own, light or dark.

Every function returns None where the entries hold nothing to draw: runs of old lack many keys.
"""

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from dsv3_jax.config import RunConfig
from dsv3_jax.drawing import (
    BLUE,
    EDGE,
    GREEN,
    GREY,
    GRID,
    ORANGE,
    SERIES,
    SLATE,
    column,
    new_figure,
    short,
    smoothed,
    thinned,
    tokens_on_x,
)
from dsv3_jax.train.schedule_picture import TITLES, planned_updates, stairs
from dsv3_jax.train.story import QUIET

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Entries = Sequence[dict[str, Any]]

# In inches. On a screen two large ones or four small ones stand side by side, on a phone one: near
# these widths, text keeps about the size of the page's own.
LARGE, SMALL = (5.0, 2.6), (3.4, 2.1)
INK = "#010101"  # not black, which SVG leaves out as the default
MARKS = 200  # vertical lines of events; more would hide the curve
# What a drawn colour is called in the page's style sheet.
VARIABLES = {color: f"var(--c{number})" for number, color in enumerate(SERIES, start=1)} | {
    INK: "var(--ink)",
    GREY: "var(--muted)",
    GRID: "var(--grid)",
    EDGE: "var(--edge)",
}
FAINT = {"alpha": 0.35, "linewidth": 0.8}
POINTS = {"linestyle": "none", "marker": "o", "markersize": 4}
DASHED = {"linestyle": "--", "linewidth": 1.0}
THIN = {"linewidth": 1.2}


class Picture(NamedTuple):
    """An SVG with what the page writes around it; `legend` are labels and CSS colours."""

    title: str
    svg: str
    legend: tuple[tuple[str, str], ...]


class Curve(NamedTuple):
    """A line by consumed tokens; without a label it has no place in the legend."""

    label: str
    color: str
    x: list[float]
    y: list[float]
    look: dict[str, Any] = {}  # noqa: RUF012  (never changed)


class Frame(NamedTuple):
    """What all curves of a run are drawn in: where the x axis ends, and its events."""

    last_token: float
    trouble: tuple[float, ...] = ()


def frame_of(entries: Entries) -> Frame:
    """The x axis of a run's curves, with marks where updates were skipped or taken back."""
    tokens = [t for t in column(entries, "tokens") if math.isfinite(t)]
    places = {
        entry["tokens"]
        for entry in of_kind(entries, "event")
        if entry.get("event") not in QUIET and entry.get("tokens") is not None
    }
    marks = sorted(places)
    return Frame(max(tokens, default=1), tuple(marks[:: 1 + len(marks) // MARKS]))


def of_kind(entries: Entries, kind: str) -> list[dict[str, Any]]:
    """The entries of one kind."""
    return [entry for entry in entries if entry["kind"] == kind]


def losses(entries: Entries) -> Picture | None:
    """Training, MTP and validation loss."""
    train, validation = of_kind(entries, "train"), of_kind(entries, "validation")
    held_out = column(validation, "tokens"), column(validation, "loss")
    return draw(
        "Loss, nats per token",
        [
            *_noisy("MTP, one token further", ORANGE, train, "mtp_loss"),
            *_noisy("training", BLUE, train, "main_loss"),
            Curve("validation", INK, *held_out, POINTS),
        ],
        frame_of(entries),
    )


def bits(entries: Entries, zlib_bpb: float | None) -> Picture | None:
    """Bits per byte of validation text, beside zlib's."""
    frame, validation = frame_of(entries), of_kind(entries, "validation")
    tokens, values = column(validation, "tokens"), column(validation, "bits_per_byte")
    curves = [Curve("model", GREEN, tokens, values, {"marker": "o", "markersize": 4})]
    if zlib_bpb is not None and math.isfinite(zlib_bpb):
        ends = [0.0, frame.last_token]
        curves.append(Curve(f"zlib level 9: {zlib_bpb:.3f}", SLATE, ends, [zlib_bpb] * 2, DASHED))
    if not any(map(math.isfinite, values)):
        return None
    return draw("Validation, bits per byte", curves, frame)


def gradients(entries: Entries, clip_norm: float) -> Picture | None:
    """The gradient's norm before clipping, whole and by group of parameters."""
    train, frame = of_kind(entries, "train"), frame_of(entries)
    by_group = [entry.get("grad_norms") or {} for entry in train]
    names = list(dict.fromkeys(name for norms in by_group for name in norms))
    tokens = column(train, "tokens")
    curves = [
        Curve(name, SERIES[place % len(SERIES)], tokens, smoothed(column(by_group, name)), THIN)
        for place, name in enumerate(names)
    ]
    curves += _noisy("all", INK, train, "grad_norm")
    if not any(math.isfinite(y) for curve in curves for y in curve.y):
        return None
    clip = Curve(f"clipped at {clip_norm:g}", SLATE, [0.0, frame.last_token], [clip_norm] * 2)
    return draw("Gradient norm", [*curves, clip._replace(look=DASHED)], frame, log=True)


def schedules(entries: Entries, cfg: RunConfig) -> list[Picture]:
    """The four schedules: as planned over the whole run, and as logged so far."""
    train, updates = of_kind(entries, "train"), planned_updates(cfg)
    frame = Frame(max(updates[-1].end, frame_of(entries).last_token))
    tokens, pictures = column(train, "tokens"), []
    for name, title in TITLES.items():
        logged = column(train, "step_rows" if name == "rows" else name)
        x, y = stairs(updates, name)
        plan = Curve("planned", SLATE, list(map(float, x)), y, DASHED)
        curves = [Curve("so far", BLUE, tokens, logged), plan]
        pictures.append(draw(title, curves, frame, SMALL, zero=True))
    return [picture for picture in pictures if picture]


def single(
    entries: Entries,
    name: str,
    title: str,
    size: tuple[float, float] = SMALL,
    factor: float = 1.0,
) -> Picture | None:
    """One value of the training entries, times `factor`, on an axis from 0."""
    train = of_kind(entries, "train")
    values = [factor * value for value in column(train, name)]
    curves = _smooth("", BLUE, column(train, "tokens"), values)
    return draw(title, curves, frame_of(entries), size, zero=True)


def memory(entries: Entries) -> Picture | None:
    """Peak memory of host and device so far."""
    train = of_kind(entries, "train")
    curves = [
        Curve(label, color, column(train, "tokens"), [v / 1e9 for v in column(train, name)])
        for label, color, name in (
            ("host", BLUE, "peak_memory"),
            ("device", ORANGE, "device_peak_memory"),
        )
    ]
    return draw("Peak memory, GB", curves, frame_of(entries), SMALL, zero=True)


def _noisy(label: str, color: str, train: Entries, name: str) -> list[Curve]:
    """A measured curve, faint, and its average. Nothing for one that is 0 throughout: switched
    off.
    """
    values = column(train, name)
    if not any(value > 0 for value in values):
        return []
    return _smooth(label, color, column(train, "tokens"), values)


def _smooth(label: str, color: str, tokens: list[float], values: list[float]) -> list[Curve]:
    average = Curve(label, color, tokens, smoothed(values))
    return [Curve("", color, tokens, values, FAINT), average]


def draw(
    title: str,
    curves: Sequence[Curve],
    frame: Frame,
    size: tuple[float, float] = LARGE,
    log: bool = False,
    zero: bool = False,
) -> Picture | None:
    """Curves in one panel. `log` draws a logarithmic y axis, `zero` begins it at 0."""
    drawn = [curve for curve in curves if any(map(math.isfinite, curve.y))]
    if not drawn:
        return None
    with one_panel(title, size) as panel:
        if log:
            panel.set_yscale("log", nonpositive="mask")
        for curve in drawn:
            look = {"linewidth": 1.6} | curve.look
            panel.plot(*thinned(curve.x, curve.y), color=curve.color, **look)
        _limit(panel, drawn, log, zero)
        tokens_on_x(panel, frame.last_token)
        if frame.trouble:
            across = panel.get_xaxis_transform()
            panel.vlines(frame.trouble, 0, 1, ORANGE, "dotted", transform=across, linewidth=0.8)
        svg = svg_of(panel, title)
    labels = {curve.label: VARIABLES[curve.color] for curve in drawn if curve.label}
    return Picture(title, svg, tuple(labels.items()))


def _limit(panel: "Axes", curves: Sequence[Curve], log: bool, zero: bool) -> None:
    """The y axis holds the averages; a faint spike may leave it."""
    shown = [
        value
        for curve in curves
        if curve.look is not FAINT
        for value in curve.y
        if math.isfinite(value) and (value > 0 or not log)
    ]
    if not shown:
        return
    low, high = (0.0 if zero else min(shown)), max(shown)
    if log:
        panel.set_ylim(low / 1.3, 1.3 * high)
        panel.yaxis.set_major_formatter(lambda value, _: short(value))  # log has set its own
        # Within a decade the powers of ten alone would say little.
        panel.yaxis.set_minor_formatter("{x:g}" if high < 5 * low else "")
    else:
        room = 0.08 * (high - low) or 0.5 * abs(high) or 1.0
        panel.set_ylim(low if zero else low - room, high + room)


@contextmanager
def one_panel(title: str, size: tuple[float, float]) -> Iterator["Axes"]:
    """A panel with fixed margins, so that neighbours align; to find the tightest ones takes as long
    as drawing. Text stays text; ids inside one picture differ from those of all others on the page.
    """
    width, height = size
    style = {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": title}
    with new_figure(width, height, layout=None, **style) as figure:
        left, right, bottom, top = 0.52 / width, 1 - 0.1 / width, 0.26 / height, 1 - 0.08 / height
        panel = figure.add_axes((left, bottom, right - left, top - bottom))
        panel.yaxis.set_major_formatter(lambda value, _: short(value))
        yield panel


def svg_of(panel: "Axes", title: str) -> str:
    """The panel as an <svg> element, the same each time; `title` is what a screen reader says."""
    data = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    panel.figure.savefig(data, format="svg", transparent=True, metadata=nothing)
    svg = data.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # ids of groups, alike in every picture
    for color, variable in VARIABLES.items():
        svg = re.sub(f"{color}(?![0-9a-f])", variable, svg, flags=re.IGNORECASE)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
