"""`python -m dsv3_jax.plan`: what a pipeline costs before it runs (report 3.2.1, Table 2)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dsv3_jax.cli import parse, run, user_errors

if TYPE_CHECKING:
    from rich.table import Table

    from dsv3_jax.parallel.schedules import Timeline

PROG = "python -m dsv3_jax.plan"
DESCRIPTION = """What a pipeline schedule costs: idle time and live activations of every rank.

Simulated beside the report's formulas, and drawn with --timeline. Times are in any unit, of one
micro-batch in one of a rank's model parts.
"""
Flag = tyro.conf.arg
LARGEST = 100_000  # ranks times micro-batches, which take about a minute


@dataclass(frozen=True)
class Options:
    """The command's options."""

    schedule: Literal["gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev"]
    """Which one"""
    ranks: int = 8
    """Devices, or groups of them, that the model's stages lie on"""
    microbatches: int = 20
    """Of one step, altogether"""
    timeline: Path | None = None
    """Picture to write: .png, .svg or .pdf"""
    forward: Annotated[float, Flag(name="F")] = 1.0
    """Time of a forward pass"""
    backward: Annotated[float, Flag(name="B")] = 2.0
    """Time of a whole backward pass; b, its input gradients alone, takes B - W"""
    weights: Annotated[float, Flag(name="W")] = 1.0
    """Time of the weight gradients"""
    fused: Annotated[float, Flag(name="FB")] = 3.0
    """Time of a forward and a backward pass in one program; below F + B where communication hides
    behind computation"""
    transfer: float | None = None
    """Time in which two neighbours stop to swap messages; default: these cross in no time, and only
    who needs one waits"""


def main(args: Sequence[str]) -> int | None:
    """The command. SystemExit 2 for the user's mistakes."""
    default = Options(schedule=tyro.MISSING)
    options = parse(Options, default, prog=PROG, description=DESCRIPTION, args=args)
    with user_errors():
        show(options)


def show(options: Options) -> None:
    """Prints the tables, and draws the picture. ValueError or OSError, one line, for bad input."""
    from rich.console import Console

    from dsv3_jax.drawing import check_picture_path
    from dsv3_jax.parallel.schedules import make, simulate
    from dsv3_jax.plan.bubbles import FORMULAS
    from dsv3_jax.plan.timeline import OPTION, draw_timeline, title

    if options.timeline:
        check_picture_path(options.timeline, OPTION)
    if options.ranks * options.microbatches > LARGEST:
        raise ValueError(
            f"--ranks {options.ranks:,} times --microbatches {options.microbatches:,} is too large "
            f"to simulate; allowed: up to {LARGEST:,}"
        )
    schedule = make(options.schedule, options.ranks, options.microbatches)
    times = (options.forward, options.backward, options.weights, options.fused)
    timeline = simulate(schedule, *times, transfer=options.transfer)
    if options.timeline:
        draw_timeline(timeline, options.timeline)
    console = Console(highlight=False)
    console.print(title(timeline), markup=False)
    console.print(whole_table(timeline, options))
    if holds := FORMULAS[options.schedule].holds:
        console.print(f"the bubble's formula holds for {holds}", markup=False, soft_wrap=True)
    console.print(rank_table(timeline))
    if options.timeline:
        console.print(f"picture: {options.timeline}", markup=False, soft_wrap=True)


def whole_table(timeline: "Timeline", options: Options) -> "Table":
    """Simulated figures beside the formulas."""
    from dsv3_jax.plan.bubbles import FORMULAS

    schedule, formula = timeline.schedule, FORMULAS[options.schedule]
    bubble = formula.bubble(
        schedule.ranks, options.forward, options.backward, options.weights, options.fused
    )
    peak = formula.peak(schedule.ranks, schedule.microbatches)
    table = _table("", "simulated", "formula")
    table.add_row("bubble", _number(timeline.bubble), f"{_number(bubble)} = {formula.text}")
    table.add_row("live activations", f"{max(timeline.peak)}", f"{peak} = {formula.live}")
    table.add_row("stages on a rank", f"{schedule.chunks}", "")
    table.add_row("step", _number(timeline.makespan), "")
    return table


def rank_table(timeline: "Timeline") -> "Table":
    """Idle time and live activations of every rank."""
    table = _table("rank", "stages", "idle", "of the step", "live activations")
    for row in _rank_rows(timeline):
        table.add_row(*row)
    return table


def _rank_rows(timeline: "Timeline") -> Iterator[tuple[str, ...]]:
    schedule = timeline.schedule
    for rank, (idle, peak) in enumerate(zip(timeline.idle, timeline.peak, strict=True)):
        stages = ", ".join(str(schedule.stage(rank, chunk)) for chunk in range(schedule.chunks))
        yield str(rank), stages, _number(idle), f"{idle / timeline.makespan:.1%}", str(peak)


def _number(time: float) -> str:
    """Without the last digits, in which sums in another order differ."""
    return f"{round(time, 9):.6g}"


def _table(*columns: str) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in ("", "formula") else "right")
    return table


if __name__ == "__main__":
    run(main)
