"""What a run leaves behind: a picture of its curves, a summary beside zlib's result, and a sample.

zlib at level 9 compresses the same validation bytes as a yardstick that everybody knows: fewer bits
per byte means that the model predicts the text better than repetition within it does.
"""

import math
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dsv3_jax.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    column,
    new_figure,
    smoothed,
    tokens_on_x,
)
from dsv3_jax.files import replace_file
from dsv3_jax.train.console import printable
from dsv3_jax.train.folder import RunFolder
from dsv3_jax.train.metrics import clock, strict_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    zlib_bits_per_byte: float | None
    """Of the same bytes; None for answers, whose questions zlib would not see"""
    validation_bytes: int
    sample_prompt: str
    sample_text: str
    picture: Path
    checkpoint: Path
    averaged_bits_per_byte: float | None = None
    """Of the averaged weights, if the run kept them"""
    passes: float | None = None
    """Over the training text; None for a mixture of several"""


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
    speed = f"{result.tokens_per_second:,.0f} tokens/s"
    share = f"{result.matmul_share:.1%} of the measured matmul peak"
    return [
        ("model", f"{result.bits_per_byte:.3f} bits per byte of validation text", "bold"),
        *_beside_zlib(result),
        *_averaged(result),
        ("validation loss", f"{result.validation_loss:.4f} nats per token", ""),
        ("trained", f"{result.tokens:,} tokens in {_steps(result)}{_passes(result)}", ""),
        ("time", f"{clock(result.seconds)}, {speed}, {share}", ""),
        ("run", str(result.run_folder), ""),
        ("checkpoint", str(result.checkpoint), ""),
        ("picture", str(result.picture), ""),
        ("report", str(RunFolder(result.run_folder).report), ""),
    ]


def _beside_zlib(result: Result) -> list[tuple[str, str, str]]:
    if result.zlib_bits_per_byte is None:
        return []
    size = f"{result.validation_bytes:,}"
    who, style = verdict(result.bits_per_byte, result.zlib_bits_per_byte)
    return [
        ("zlib -9", f"{result.zlib_bits_per_byte:.3f} on the same {size} bytes", ""),
        ("", who, style),
    ]


def _steps(result: Result) -> str:
    return "1 step" if result.steps == 1 else f"{result.steps:,} steps"


def _passes(result: Result) -> str:
    return "" if result.passes is None else f", {result.passes:.2g} times the training text"


def _averaged(result: Result) -> list[tuple[str, str, str]]:
    if result.averaged_bits_per_byte is None:
        return []
    return [("averaged", f"{result.averaged_bits_per_byte:.3f} with the averaged weights", "")]


def verdict(model: float, yardstick: float) -> tuple[str, str]:
    """Who wins, in a sentence, and the style to print it in."""
    if not math.isfinite(model):
        return "the loss is not finite: the run diverged", "bold red"
    share = f"{abs(model - yardstick) / yardstick:.1%}"
    if model < yardstick:
        return f"the model wins: {share} fewer bits than zlib", "green"
    if model > yardstick:
        return f"zlib wins: the model needs {share} more bits", "yellow"
    return "a draw", ""


def loss_picture(entries: list[dict[str, Any]], path: Path, zlib_bpb: float | None) -> None:
    """Draw a run's curves as a PNG: losses, bits per byte beside zlib's, learning rate, MaxVio.

    `entries` are those of `metrics.jsonl`; missing values leave gaps, missing kinds empty panels.
    """
    train = [entry for entry in entries if entry["kind"] == "train"]
    validation = [entry for entry in entries if entry["kind"] == "validation"]
    last_token = max((entry["tokens"] for entry in train + validation), default=1)
    with new_figure(10, 5.4) as figure:
        loss, bits, rate, balance = _panels(figure, last_token)
        _draw_losses(loss, train, validation)
        _draw_bits(bits, validation, zlib_bpb)
        _draw_small(rate, train, "learning_rate", "learning rate")
        _draw_small(balance, train, "max_violation", "MaxVio (0 = experts in balance)")
        figure.savefig(path, format="png")


def _panels(figure: "Figure", last_token: int) -> list["Axes"]:
    panels = list(figure.subplots(2, 2, height_ratios=(3, 1), sharex=True).flat)
    for panel in panels[2:]:
        panel.set_xlabel("tokens")
    tokens_on_x(panels[0], last_token)  # the others share its axis
    return panels


def _draw_losses(panel: "Axes", train: list[dict], validation: list[dict]) -> None:
    panel.set_title("Loss (nats per token)")
    tokens = column(train, "tokens")
    for name, label, color in (
        ("mtp_loss", "MTP: one token further", ORANGE),
        ("main_loss", "training", BLUE),
    ):
        values = column(train, name)
        if any(value > 0 for value in values):
            panel.plot(tokens, values, color=color, alpha=0.35, linewidth=1)
            panel.plot(tokens, smoothed(values), color=color, label=label)
    if validation:
        points = column(validation, "tokens"), column(validation, "loss")
        panel.plot(*points, "o", color="black", markersize=5, label="validation")
    if panel.lines:
        panel.legend(reverse=True)


def _draw_bits(panel: "Axes", validation: list[dict], zlib_bpb: float | None) -> None:
    panel.set_title("Validation (bits per byte)")
    panel.margins(y=0.15)
    tokens, bits = column(validation, "tokens"), column(validation, "bits_per_byte")
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
    values = column(train, name)
    panel.plot(column(train, "tokens"), values, color=GREY, linewidth=1.5)
    highest = max(filter(math.isfinite, values), default=0)
    panel.set_ylim(0, 1.1 * highest or 1)
