"""A search's answer as a table for people and as JSON for programs, the same figures in both."""

from typing import TYPE_CHECKING, Any

from dsv3_jax.plan.cells import GB
from dsv3_jax.plan.layer_time import NOT_COUNTED
from dsv3_jax.plan.memory import MemoryPlan
from dsv3_jax.plan.search import Answer, Found, options_of

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = {  # heads in two lines, so that a terminal's 80 columns take them
    "pipe×data×\nnode×local": "{mesh[pipe]}×{mesh[data]}×{mesh[node]}×{mesh[local]}",
    "schedule": "{schedule}",
    "remat": "{remat}",
    "step,\ns": "{step_seconds:.4g}",
    "tokens/s\na device": "{tokens_per_second:,.0f}",
    "hours/T\ntokens": "{hours_per_trillion:,.0f}",
    "bubble": "{bubble:.1%}",
    "GB\nleft": "{left_gigabytes:.3g}",
    "less\nwork-\nspace": "{left_with_workspace_gigabytes:.3g}",
}


def search_json(answer: Answer) -> dict[str, Any]:
    """All that was found, and what holds least."""
    hardware = answer.ask.hardware
    return {
        "hardware": hardware.name,
        "devices": answer.ask.devices,
        "assumed": list(hardware.assumed),
        "not_counted": NOT_COUNTED,
        "layouts": answer.layouts,
        "fitting": answer.fitting,
        "fastest": _rows(answer),
        "nearest": _held(answer.nearest) | {"missing_gigabytes": answer.missing / GB},
    }


def search_table(answer: Answer) -> "Table":
    """A row for each layout, fastest first."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for number, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if number < 3 else "right", no_wrap=True)
    for row in _rows(answer):
        table.add_row(*(form.format(**row) for form in COLUMNS.values()))
    return table


def search_lines(answer: Answer) -> list[str]:
    """What is said below the table."""
    ask = answer.ask
    name, room = ask.hardware.name, ask.hardware.memory.value / GB
    if answer.fastest:
        fit = f"{answer.fitting:,} of {answer.layouts:,} meshes with a schedule fit"
        short = sum(row["left_with_workspace_gigabytes"] < 0 for row in _rows(answer))
        below = f"; below 0 in {short} of these {len(answer.fastest)}" if short else ""
        return [
            f"{fit} in {name}'s {room:g} GB; GB left, on the fullest rank, is what decides",
            f"less workspace: programs' own memory, an estimate, taken off too{below}",
            f"the first one's options: {answer.fastest[0].options}",
        ]
    rank = answer.nearest.heaviest
    term = rank.dominant
    none = f"none of {answer.layouts:,} meshes with a schedule fits in {name}'s {room:g} GB"
    share = f"{rank.persistent[term] / GB:,.1f} of {rank.total / GB:,.1f} GB on rank {rank.rank}"
    return [
        f"{none}: the best misses by {answer.missing / GB:,.1f} GB; most are {term}, {share}",
        f"its options: {options_of(answer.nearest.cfg)}",
    ]


def _rows(answer: Answer) -> list[dict[str, Any]]:
    return [_row(found, answer.ask.hardware.memory.value) for found in answer.fastest]


def _row(found: Found, capacity: float) -> dict[str, Any]:
    prediction, memory = found.prediction, found.memory
    fullest = memory.fullest  # with workspace another rank may be
    return _held(memory) | {
        "left_gigabytes": (capacity - memory.most) / GB,
        "left_with_workspace_gigabytes": (capacity - fullest.total - fullest.workspace) / GB,
        "step_seconds": found.seconds,
        "tokens_per_second": prediction.tokens_per_second,
        "hours_per_trillion": prediction.hours_per_trillion,
        "bubble": found.bubble,
    }


def _held(plan: MemoryPlan) -> dict[str, Any]:
    """The layout, and what it holds on its fullest rank."""
    cfg, rank = plan.cfg, plan.heaviest
    return {
        "mesh": cfg.mesh.sizes,
        "schedule": cfg.pipeline.schedule,
        "microbatches": cfg.train.microbatches,
        "remat": cfg.train.remat,
        "options": options_of(cfg),
        "rank": rank.rank,
        "gigabytes": rank.total / GB,
        "terms": {name: size / GB for name, size in rank.persistent.items()},
        "dominant": rank.dominant,
        "workspace_gigabytes": rank.workspace / GB,
    }
