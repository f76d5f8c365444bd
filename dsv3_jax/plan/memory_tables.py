"""What a plan says of memory: a table by rank, whether it fits, what to change; JSON; bars."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3_jax.drawing import GREY, SERIES, new_figure, save_picture
from dsv3_jax.plan.cells import GB, gigabytes, new_table
from dsv3_jax.plan.memory import MemoryPlan, RankMemory, changes_of

if TYPE_CHECKING:
    from rich.table import Table

OPTION = "--memory-bars"
WORDS = {"tapes": "between b and W", "residuals": "between F and b"}


def memory_table(plan: MemoryPlan) -> "Table":
    """GB of a device of every rank; ranks that are alike in one row."""
    terms = [WORDS.get(term, term) for term in plan.ranks[0].persistent]
    columns = ("ranks", "stages", *terms, "live sets", "sum", "workspace")
    table = new_table("memory of a device, GB", *columns, words={"stages"})
    for cells, same in groupby(plan.ranks, key=_cells):
        ranks = [rank.rank for rank in same]
        first, last = ranks[0], ranks[-1]
        table.add_row(f"{first}–{last}" if first < last else f"{first}", *cells)
    return table


def _cells(rank: RankMemory) -> tuple[str, ...]:
    sizes = [*rank.persistent.values()]
    sets = sum(rank.live.residuals.values()) + sum(rank.live.tapes.values())
    stages = "  ".join(rank.stages)
    numbers = [gigabytes(size) for size in sizes]
    return stages, *numbers, str(sets), gigabytes(rank.total), gigabytes(rank.workspace)


def memory_lines(plan: MemoryPlan, capacity: float, skew: float) -> Iterator[str]:
    """Whether it fits a device of so many bytes, what takes most, and what would change that."""
    rank, exchange = plan.fullest, plan.exchange
    yield (
        f"fullest: rank {rank.rank}, {gigabytes(rank.total)} GB, most of it "
        f"{gigabytes(rank.persistent[rank.dominant])} GB {_spoken(rank.dominant)}; its programs "
        f"take an estimated {gigabytes(rank.workspace)} GB more for themselves"
    )
    if exchange:
        rounds = math.ceil(skew / exchange.factor)
        yield (
            f"exchange: buckets of {exchange.rows:,} rows, {gigabytes(exchange.size)} GB in a "
            f"layer, whatever the routing; a device with {skew:g} times its share of token copies "
            f"takes {rounds} round{'s' * (rounds > 1)}"
        )
    has = f"{capacity / GB:g} GB"
    if not plan.exceeds(capacity):
        yield f"fits: {gigabytes(capacity - plan.most)} GB of {has} are left for workspace"
        over = rank.total + rank.workspace - capacity
        if over <= 0:
            return
        yield f"with the estimated workspace it exceeds them by {gigabytes(over)} GB"
        yield from _change_lines(plan, capacity, workspace=True)
    else:
        most = plan.heaviest
        yield (
            f"does not fit: rank {most.rank} exceeds {has} by "
            f"{gigabytes(plan.exceeds(capacity))} GB, workspace left out; its largest term is "
            f"{_spoken(most.dominant)}"
        )
        yield from _change_lines(plan, capacity, workspace=False)


def _change_lines(plan: MemoryPlan, capacity: float, workspace: bool) -> Iterator[str]:
    """Judged as the plan is: with workspace or without."""
    changes, devices = changes_of(plan, workspace), plan.cfg.mesh.size
    for change in changes:
        more = f", {change.devices:,} devices instead of {devices:,}"
        with_it = " with workspace" * workspace
        fits = "fits" if change.most <= capacity else "does not fit"
        yield (
            f"  {change.text}{more * (change.devices != devices)}: {gigabytes(change.most)} GB"
            f"{with_it}, {fits}"
        )
    if not any(change.most <= capacity for change in changes):
        alone = "none of these alone makes room" if changes else "no one change makes room"
        yield f"{alone}: --search --devices N finds what fits on N devices"


def _spoken(term: str) -> str:
    return {
        "residuals": "micro-batches between F and b",
        "tapes": "micro-batches between b and W",
        "gradients": "sums of gradients",
    }.get(term, term)


def memory_json(plan: MemoryPlan, capacity: float) -> dict[str, Any]:
    """The same in bytes."""
    return {
        "capacity_bytes": capacity,
        "exceeds_by_bytes": plan.exceeds(capacity),
        "ranks": [
            asdict(rank) | {"sum": rank.total, "workspace": rank.workspace} for rank in plan.ranks
        ],
    }


def draw_memory(plan: MemoryPlan, path: Path, capacity: float) -> None:
    """A bar for every rank, by term. ValueError for another suffix than a picture's, OSError where
    it cannot be written.
    """
    with new_figure(max(7.0, 2.5 + 0.5 * len(plan.ranks)), 4.6) as figure:
        panel = figure.subplots()
        ranks = [rank.rank for rank in plan.ranks]
        bottom = [0.0] * len(ranks)
        bars = [(WORDS.get(term, term), term) for term in plan.ranks[0].persistent]
        for (label, term), color in zip(bars, SERIES, strict=False):
            heights = [rank.persistent[term] / GB for rank in plan.ranks]
            panel.bar(ranks, heights, 0.8, bottom, color=color, label=label)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        workspace = [rank.workspace / GB for rank in plan.ranks]
        panel.bar(
            ranks, workspace, 0.8, bottom, color="none", edgecolor=GREY, label="workspace, estimate"
        )
        panel.axhline(capacity / GB, color=GREY, linestyle="--", linewidth=1)
        panel.set_axisbelow(True)
        panel.set_xticks(ranks)
        panel.set_xlabel("pipeline rank")
        panel.set_ylabel("GB on each of its devices")
        panel.set_title("Memory of a device")
        panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
        save_picture(figure, path, OPTION)
