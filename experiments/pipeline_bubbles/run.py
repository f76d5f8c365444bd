"""What five pipeline schedules cost: idle time, parameters and activations (report Table 2).

    python experiments/pipeline_bubbles/run.py
    python experiments/pipeline_bubbles/run.py --times times.json

Closed form beside simulation on 4, 8 and 16 ranks; a second, and no device. The file holds measured
times, {"F": seconds, "B": seconds, "W": seconds, "FB": seconds} and, unless it is B - W, "b".
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dsv3_jax.cli import parse, run, user_errors
from dsv3_jax.config.plain_json import read_table
from dsv3_jax.parallel.schedules import NAMES, Schedule, Timeline, make, simulate
from dsv3_jax.plan.bubbles import FORMULAS

RANKS = (4, 8, 16)
PER_RANK = 4  # micro-batches
KINDS = ("F", "B", "W", "FB")
NOTHING_HIDDEN = {"F": 1.0, "B": 2.0, "W": 1.0, "FB": 3.0}
PARTLY_HIDDEN = NOTHING_HIDDEN | {"FB": 2.2}


@dataclass(frozen=True)
class Options:
    """The command's options."""

    times: Path | None = None
    """JSON of measured seconds by kind of operation"""


def main(args: Sequence[str]) -> None:
    """Prints the tables. SystemExit 2 for a file that holds no times."""
    options = parse(Options, Options(), prog="run.py", description=__doc__, args=args)
    with user_errors():
        tables = [NOTHING_HIDDEN, PARTLY_HIDDEN]
        if options.times:
            tables = [read_times(options.times)]
        print(
            "\n| schedule | stages | on a rank | live sets, formula | simulated | in models |\n"
            "| --- | --- | --- | --- | --- | --- |"
        )
        print("\n".join(memory_rows(RANKS[1])))
        for times in tables:
            print(f"\n{', '.join(f'{kind} = {time:g}' for kind, time in times.items())}\n")
            print("| schedule | ranks | bubble, formula | simulated | idle | step | swaps block |")
            print("| --- | --- | --- | --- | --- | --- | --- |")
            print("\n".join(bubble_rows(times)))


def read_times(file: Path) -> dict[str, float]:
    """Measured times by kind. ValueError or OSError, one line, for what a file should not hold."""
    times = read_table(file)
    if missing := [kind for kind in KINDS if kind not in times]:
        raise ValueError(f"{file}: no time of {', '.join(missing)}")
    for kind, time in times.items():
        if kind not in (*KINDS, "b"):
            raise ValueError(f"{file}: {kind} is no kind; allowed: {', '.join(KINDS)}, b")
        if isinstance(time, bool) or not isinstance(time, int | float) or not 0 < time < math.inf:
            raise ValueError(f"{file}: time of {kind} is {time!r}; allowed: seconds above 0")
    if times.get("b", times["B"] - times["W"]) <= 0:
        raise ValueError(f"{file}: B is no longer than W; allowed: a time of b beside them")
    return {kind: float(times[kind]) for kind in (*KINDS, "b") if kind in times}


def memory_rows(ranks: int) -> Iterator[str]:
    """What a rank holds, whatever operations take."""
    for name in NAMES:
        timeline = simulated(name, ranks, NOTHING_HIDDEN)
        schedule, formula = timeline.schedule, FORMULAS[name]
        assert schedule.chunks == formula.stages_on_rank
        expected = formula.peak(ranks, schedule.microbatches)
        peak = max(timeline.peak)
        yield (
            f"| `{name}` | {schedule.stages} | {schedule.chunks} | {formula.live} = {expected} "
            f"| {peak} | {peak / schedule.stages:.4g} |"
        )


def bubble_rows(times: Mapping[str, float]) -> Iterator[str]:
    """Idle time of the rank that idles most, idle share of all, step against 1F1B's of the same
    model, and the first again if neighbours stop at each swap.
    """
    for name in NAMES:
        for ranks in RANKS:
            timeline = simulated(name, ranks, times)
            formula = FORMULAS[name].bubble(ranks, *(times[kind] for kind in KINDS))
            step = model_step(timeline) / model_step(simulated("1f1b", ranks, times))
            blocking = simulated(name, ranks, times, transfer=0)
            yield (
                f"| `{name}` | {ranks} | {formula:.4g} | {timeline.bubble:.4g} "
                f"| {timeline.idle_share:.1%} | {step:.3f} | {blocking.bubble:.4g} |"
            )


def model_step(timeline: Timeline) -> float:
    """Of one model, whose parts are half as long where there are twice as many of them."""
    return timeline.makespan * timeline.schedule.ranks / timeline.schedule.stages


def simulated(
    name: str, ranks: int, times: Mapping[str, float], transfer: float | None = None
) -> Timeline:
    """A step of four micro-batches a rank."""
    return simulate(step_of(name, ranks), measured=times, transfer=transfer)


@cache
def step_of(name: str, ranks: int) -> Schedule:
    """Which every table takes."""
    return make(name, ranks, PER_RANK * ranks)


if __name__ == "__main__":
    sys.exit(run(main))
