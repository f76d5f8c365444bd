"""What a pipeline schedule costs, as tables: the whole beside the report's formulas, and ranks."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dsv3_jax.plan.cells import new_table
from dsv3_jax.plan.options import Options

if TYPE_CHECKING:
    from rich.table import Table

    from dsv3_jax.parallel.schedules import Timeline


def whole_table(timeline: "Timeline", options: Options) -> "Table":
    """Simulated figures beside the formulas."""
    from dsv3_jax.plan.bubbles import FORMULAS

    schedule, formula = timeline.schedule, FORMULAS[options.schedule]
    bubble = formula.bubble(schedule.ranks, *options.times)
    peak = formula.peak(schedule.ranks, schedule.microbatches)
    table = new_table(None, "", "simulated", "formula", words={"", "formula"})
    table.add_row("bubble", _number(timeline.bubble), f"{_number(bubble)} = {formula.text}")
    table.add_row("live activations", f"{max(timeline.peak)}", f"{peak} = {formula.live}")
    table.add_row("stages on a rank", f"{schedule.chunks}", "")
    table.add_row("step", _number(timeline.makespan), "")
    return table


def rank_table(timeline: "Timeline") -> "Table":
    """Idle time and live activations of every rank."""
    table = new_table(None, "rank", "stages", "idle", "of the step", "live activations")
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
