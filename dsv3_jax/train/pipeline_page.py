"""The part of a run's page about its pipeline: measured operations, and the timeline that a
simulation makes of them.
"""

from collections.abc import Sequence
from typing import Any

from dsv3_jax.parallel.schedules import make, simulate
from dsv3_jax.plan.timeline import draw, title
from dsv3_jax.train.page_pictures import Picture, of_kind, one_panel, svg_of

NOTE = (
    "one step's operations, each waited for; the timeline is simulated from their medians by rank"
)
HEADS = ("Rank", "Operation", "ms")


def timeline_of(entry: dict[str, Any]) -> Any:
    """Simulated from an entry's measured times, in milliseconds."""
    schedule = make(entry["schedule"], entry["ranks"], entry["microbatches"])
    measured: dict[Any, float] = {}
    for kind, seconds in entry["seconds"].items():
        known = [1000 * s for s in seconds if s is not None]
        measured[kind] = sum(known) / len(known)
        measured |= {(r, kind): 1000 * s for r, s in enumerate(seconds) if s is not None}
    return simulate(schedule, measured=measured)


def pictures(entries: Sequence[dict[str, Any]]) -> list[Picture]:
    """The timeline of the newest measurement; none for runs without a pipeline."""
    found = of_kind(entries, "pipeline")
    if not found:
        return []
    timeline = timeline_of(found[-1])
    name = title(timeline)
    with one_panel(name, (11.0, 1.4 + 0.36 * timeline.schedule.ranks)) as panel:
        draw(panel, timeline, unit="ms")
        return [Picture(name, svg_of(panel, name), ())]


def table(entries: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each operation of each rank."""
    rows = []
    for entry in of_kind(entries, "pipeline")[-1:]:
        for kind, seconds in entry["seconds"].items():
            rows += [
                (str(rank), kind, f"{1000 * s:,.1f}")
                for rank, s in enumerate(seconds)
                if s is not None
            ]
    return sorted(rows)
