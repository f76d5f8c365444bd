"""A picture of a pipeline's timeline: a row for a rank, a box for an operation.

As in the report's Figure 5. What runs from the first rank to the last is dark; what runs
the other way, or on the second leg of a V, is light. A fused pair has its forward half above its
backward half. Where the grey is seen, a rank idles.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dsv3_jax.drawing import AMBER, BLUE, GREEN, GREY, GRID, ORANGE, new_figure, save_picture
from dsv3_jax.parallel.schedules import Span, Timeline, Work

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OPTION = "--timeline"
COLORS = {"F": BLUE, "B": ORANGE, "b": AMBER, "W": GREEN}
WORDS = {"F": "F forward", "B": "B backward", "b": "b input gradients", "W": "W weight gradients"}
LIGHT = 0.6  # share of white in what runs in chunk 1
HEIGHT = 0.84  # of a box, in rows
WIDEST = 24.0  # inches of a picture
UNIT_WIDTH = 0.23  # inches of a shortest operation, where there is room
SMALLEST_FONT = 4.0  # points; numbers that would be smaller are left out


class Box(NamedTuple):
    """A rectangle with a micro-batch number; rows count from the first rank down."""

    start: float
    duration: float
    bottom: float
    height: float
    kind: str
    work: Work


def draw_timeline(timeline: Timeline, path: Path, unit: str = "") -> None:
    """Draws a timeline as a PNG, SVG or PDF; `unit` of its times.

    ValueError for another suffix, OSError where the file cannot be written.
    """
    lengths = (span.end - span.start for span in timeline.spans)
    shortest = min(length for length in lengths if length)  # a stage may have nothing to do in b
    width = min(WIDEST, max(8.0, UNIT_WIDTH * timeline.makespan / shortest))
    with new_figure(width, 1.7 + 0.36 * timeline.schedule.ranks) as figure:
        panel = figure.subplots()
        draw(panel, timeline, unit)
        panel.set_title(title(timeline))
        save_picture(figure, path, OPTION)


def title(timeline: Timeline) -> str:
    """What is drawn, and how much of it is idle."""
    schedule = timeline.schedule
    ranks = f"{schedule.ranks:,} rank{'s' * (schedule.ranks > 1)}"
    number = f"{schedule.microbatches:,} micro-batch{'es' * (schedule.microbatches > 1)}"
    return f"{schedule.name}: {ranks}, {number}, {timeline.idle_share:.1%} idle"


def draw(panel: "Axes", timeline: Timeline, unit: str = "") -> None:
    """Boxes, numbers, axes and legend on a panel whose figure has its size; `unit` of the times."""
    ranks, makespan = timeline.schedule.ranks, timeline.makespan
    for rank in range(ranks):
        panel.broken_barh([(0, makespan)], (rank - HEIGHT / 2, HEIGHT), color=GRID, linewidth=0)
    boxes = [box for span in timeline.spans for box in boxes_of(span)]
    _draw_boxes(panel, boxes)
    panel.set(xlim=(0, makespan), ylim=(ranks - 0.5, -0.5), ylabel="rank")
    panel.set_xlabel(f"time in {unit}" if unit else "time")
    panel.set_yticks(range(ranks))
    panel.grid(visible=False)
    _draw_numbers(panel, boxes)
    _draw_legend(panel, timeline, {box.kind for box in boxes})


def boxes_of(span: Span) -> list[Box]:
    """One box, or two above each other for a fused pair."""
    operation, top = span.operation, span.rank - HEIGHT / 2
    halves = [("F", operation.forward)] * (operation.forward is not None)
    if operation.backward:
        halves.append(("B" if operation.kind == "FB" else operation.kind, operation.backward))
    height = HEIGHT / len(halves)
    return [
        Box(span.start, span.end - span.start, top + height * i, height, kind, work)
        for i, (kind, work) in enumerate(halves)
    ]


def _draw_boxes(panel: "Axes", boxes: list[Box]) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    rectangles = [Rectangle((b.start, b.bottom), b.duration, b.height) for b in boxes]
    colors = [_shade(COLORS[box.kind], box.work.chunk) for box in boxes]
    panel.add_collection(
        PatchCollection(rectangles, facecolors=colors, edgecolors="white", linewidths=0.4)
    )


def _draw_numbers(panel: "Axes", boxes: list[Box]) -> None:
    """Micro-batches in their boxes, all in one size: what the narrowest box has room for."""
    width, height = panel.get_window_extent().size * 72 / panel.figure.dpi
    points = width / panel.get_xlim()[1] * min(box.duration for box in boxes)
    digits = max(len(str(box.work.microbatch)) for box in boxes)
    row = height / abs(panel.get_ylim()[0] - panel.get_ylim()[1])
    size = min(9.0, points / (0.68 * digits), 0.85 * row * min(box.height for box in boxes))
    if size < SMALLEST_FONT:
        return
    for box in boxes:
        panel.text(
            box.start + box.duration / 2,
            box.bottom + box.height / 2,
            str(box.work.microbatch),
            color="black" if box.work.chunk or box.kind == "b" else "white",
            size=size,
            ha="center",
            va="center_baseline",
        )


def _draw_legend(panel: "Axes", timeline: Timeline, kinds: set[str]) -> None:
    """Below the x axis and its label."""
    from matplotlib.patches import Patch
    from matplotlib.transforms import ScaledTranslation

    handles = [Patch(color=COLORS[kind], label=WORDS[kind]) for kind in COLORS if kind in kinds]
    if timeline.schedule.chunks == 2:
        way = "second leg" if timeline.schedule.name == "dualpipev" else "from the last rank"
        handles.append(Patch(color=_shade(GREY, 1), label=f"light: {way}"))
    handles.append(Patch(color=GRID, label="idle"))
    figure = panel.figure
    below = ScaledTranslation(0, -0.42, figure.dpi_scale_trans)
    panel.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0, 0),
        bbox_transform=panel.transAxes + below,
        borderaxespad=0,
        ncols=6 if figure.get_figwidth() > 11 else 3,
    )


def _shade(color: str, chunk: int) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    light = LIGHT * chunk
    return tuple(light + (1 - light) * part for part in to_rgb(color))
