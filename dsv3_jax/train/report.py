"""What a run leaves behind: a picture of its curves, a summary beside zlib's result, and a sample.

zlib at level 9 compresses the same validation bytes as a yardstick that everybody knows: fewer bits
per byte means that the model predicts the text better than repetition within it does.
"""

import logging
import math
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dsv3_jax.files import replace_file
from dsv3_jax.train.metrics import clock, strict_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
SMOOTHING = 0.015  # share of the entries over which the average of a curve fades to 1/e, each way


@dataclass(frozen=True)
class Result:
    """A finished run: `validation_loss` in nats per token, `matmul_share` a fraction."""

    run_folder: Path
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    matmul_share: float
    validation_loss: float
    bits_per_byte: float
    zlib_bits_per_byte: float
    validation_bytes: int
    sample_prompt: str
    sample_text: str
    picture: Path
    checkpoint: Path


def zlib_bits_per_byte(data: bytes) -> float:
    """Bits that zlib at level 9 needs per byte of `data`. ValueError if there is none."""
    if not data:
        raise ValueError("zlib_bits_per_byte: found 0 bytes; allowed: at least 1")
    return 8 * len(zlib.compress(data, 9)) / len(data)


def write_summary(result: Result, path: str | Path) -> None:
    """The result as JSON; values that are not finite become null."""
    replace_file(path, (strict_json(asdict(result), indent=2) + "\n").encode())


def summary(result: Result, console: Console | None = None) -> None:
    """Print the result, then the sample (if it has any text) in a panel of its own."""
    console = console or Console()
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text, style in _rows(result):
        table.add_row(label, Text(printable(text, console.encoding), style))
    console.print(Panel(table, title="result", title_align="left", expand=False))
    if result.sample_text:
        sample = Text(printable(result.sample_prompt, console.encoding), "bold")
        sample.append(printable(result.sample_text.rstrip(), console.encoding), "not bold")
        console.print(Panel(sample, title="sample", title_align="left"))


def _rows(result: Result) -> list[tuple[str, str, str]]:
    verdict, style = _verdict(result.bits_per_byte, result.zlib_bits_per_byte)
    speed = f"{result.tokens_per_second:,.0f} tokens/s"
    size = f"{result.validation_bytes:,}"
    share = f"{result.matmul_share:.1%} of the measured matmul peak"
    return [
        ("model", f"{result.bits_per_byte:.3f} bits per byte of validation text", "bold"),
        ("zlib -9", f"{result.zlib_bits_per_byte:.3f} on the same {size} bytes", ""),
        ("", verdict, style),
        ("validation loss", f"{result.validation_loss:.4f} nats per token", ""),
        ("trained", f"{result.tokens:,} tokens in {result.steps:,} steps", ""),
        ("time", f"{clock(result.seconds)}, {speed}, {share}", ""),
        ("run", str(result.run_folder), ""),
        ("checkpoint", str(result.checkpoint), ""),
        ("picture", str(result.picture), ""),
    ]


def _verdict(model: float, yardstick: float) -> tuple[str, str]:
    """Who wins, in a sentence, and the style to print it in."""
    if not math.isfinite(model):
        return "the loss is not finite: the run diverged", "bold red"
    share = f"{abs(model - yardstick) / yardstick:.1%}"
    if model < yardstick:
        return f"the model wins: {share} fewer bits than zlib", "green"
    if model > yardstick:
        return f"zlib wins: the model needs {share} more bits", "yellow"
    return "a draw", ""


def printable(text: str, encoding: str) -> str:
    """Text that is safe to print: no character steers the terminal, none is unknown to `encoding`.

    A model may write any byte. Control characters other than newline and tab appear as U+FFFD.
    """
    steering = {c for c in text if unicodedata.category(c) == "Cc"} - {"\n", "\t"}
    shown = text.translate({ord(c): "\N{REPLACEMENT CHARACTER}" for c in steering})
    return shown.encode(encoding, "replace").decode(encoding)


def loss_picture(entries: list[dict[str, Any]], path: Path, zlib_bpb: float | None) -> None:
    """Draw a run's curves as a PNG: losses, bits per byte beside zlib's, learning rate, MaxVio.

    `entries` are those of `metrics.jsonl`; missing values leave gaps, missing kinds empty panels.
    """
    train = [entry for entry in entries if entry["kind"] == "train"]
    validation = [entry for entry in entries if entry["kind"] == "validation"]
    last_token = max((entry["tokens"] for entry in train + validation), default=1)
    with _matplotlib() as figure:
        loss, bits, rate, balance = _panels(figure, last_token)
        _draw_losses(loss, train, validation)
        _draw_bits(bits, validation, zlib_bpb)
        _draw_small(rate, train, "learning_rate", "learning rate")
        _draw_small(balance, train, "max_violation", "MaxVio (0 = experts in balance)")
        figure.savefig(path, format="png")


@contextmanager
def _matplotlib() -> Iterator["Figure"]:
    """A figure with our own settings, whatever the user's are, and without a word about fonts."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)  # the font cache, built once, is announced by a warning
    try:
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_STYLE)
            # Made without pyplot: it draws by Agg, needs no display and leaves nothing open.
            yield Figure(figsize=(10, 5.4), dpi=150, layout="constrained")
    finally:
        logger.setLevel(level)


_STYLE = {
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "axes.labelcolor": GREY,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "font.size": 11,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "xtick.color": GREY,
    "ytick.color": GREY,
}


def _panels(figure: "Figure", last_token: int) -> list["Axes"]:
    from matplotlib.ticker import EngFormatter

    panels = list(figure.subplots(2, 2, height_ratios=(3, 1), sharex=True).flat)
    for panel in panels[2:]:
        panel.set_xlabel("tokens")
        panel.xaxis.set_major_formatter(EngFormatter())
    panels[0].set_xlim(0, 1.02 * last_token)
    return panels


def _column(entries: list[dict[str, Any]], name: str) -> list[float]:
    """Values of one key; NaN, which leaves a gap, where an entry has no finite one."""
    values = (entry.get(name) for entry in entries)
    return [math.nan if v is None or not math.isfinite(v) else float(v) for v in values]


def _draw_losses(panel: "Axes", train: list[dict], validation: list[dict]) -> None:
    panel.set_title("Loss (nats per token)")
    tokens = _column(train, "tokens")
    for name, label, color in (
        ("mtp_loss", "MTP: one token further", ORANGE),
        ("main_loss", "training", BLUE),
    ):
        values = _column(train, name)
        if any(value > 0 for value in values):
            panel.plot(tokens, values, color=color, alpha=0.35, linewidth=1)
            panel.plot(tokens, smoothed(values), color=color, label=label)
    if validation:
        points = _column(validation, "tokens"), _column(validation, "loss")
        panel.plot(*points, "o", color="black", markersize=5, label="validation")
    if panel.lines:
        panel.legend(reverse=True)


def _draw_bits(panel: "Axes", validation: list[dict], zlib_bpb: float | None) -> None:
    panel.set_title("Validation (bits per byte)")
    panel.margins(y=0.15)
    tokens, bits = _column(validation, "tokens"), _column(validation, "bits_per_byte")
    panel.plot(tokens, bits, "o-", color=GREEN, markersize=5)
    if bits and math.isfinite(bits[-1]):
        _annotate(panel, f"{bits[-1]:.3f}", tokens[-1], bits[-1], (0, -16), GREEN, "data", "right")
    if zlib_bpb is not None:
        panel.axhline(zlib_bpb, color=GREY, linestyle="--")
        # Where a falling curve is not: at the left below the line, unless it starts there.
        offset = (4, 5) if bits and bits[0] < zlib_bpb else (4, -14)
        _annotate(
            panel, f"zlib level 9: {zlib_bpb:.3f}", 0, zlib_bpb, offset, GREY, "axes fraction"
        )


def _annotate(
    panel: "Axes",
    text: str,
    x: float,
    y: float,
    offset: tuple[int, int],
    color: str,
    x_unit: str,
    align: str = "left",
) -> None:
    """Text beside the point (x, y), moved by `offset` points; y is in data units."""
    panel.annotate(
        text,
        (x, y),
        offset,
        xycoords=(x_unit, "data"),
        textcoords="offset points",
        color=color,
        ha=align,
        weight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )


def _draw_small(panel: "Axes", train: list[dict], name: str, title: str) -> None:
    panel.set_title(title, size=11, weight="normal")
    values = _column(train, name)
    panel.plot(_column(train, "tokens"), values, color=GREY, linewidth=1.5)
    highest = max(filter(math.isfinite, values), default=0)
    panel.set_ylim(0, 1.1 * highest or 1)


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
