"""The figures of loads on servers as a table. Times are of all rounds' requests together, so that
their ends have something to be read from; rates are medians over rounds.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from contenders.outcomes import Outcome, percentile
from contenders.side_by_side import Contender
from contenders.table import aligned

HEADINGS = (
    "",
    "versions",
    "tokens/s",
    "requests/s",
    "first token, ms",
    "a token, ms",
    "request, s",
    "429, errors",
    "peak MB",
    "cores, client %",
)
SHARES = (0.5, 0.9, 0.99)


def name_of(load: Mapping[str, float]) -> str:
    """For people."""
    if "rate" in load:
        return f"{load['rate']:g} a second"
    return f"{load['clients']} clients" if load["clients"] > 1 else "1 client"


def load_table(contenders: Sequence[Contender], loads: Sequence[Mapping[str, float]]) -> list[str]:
    """Lines of Markdown: a row for each load and contender, and notes. If one of them is the
    baseline, all are compared with it.
    """
    baseline = next((one for one in contenders if one.is_baseline), None)
    headings = [*HEADINGS, *([f"× {baseline.name.split()[0]}, of rounds"] if baseline else [])]
    rows = [
        _row(name_of(load), one, place, baseline)
        for place, load in enumerate(loads)
        for one in contenders
    ]
    return [*aligned([headings, *rows]), "", *_notes(contenders)]


def _row(name: str, contender: Contender, place: int, baseline: Contender | None) -> list[str]:
    turns = [turn[place] for turn in contender.loads]
    asked = [Outcome(*one) for turn in turns for one in turn["outcomes"]]
    served = [one for one in asked if one.status == 200]
    refused = sum(one.status == 429 for one in asked)
    seconds = sum(turn["seconds"] for turn in turns)
    cores, client = (sum(turn[whose] for turn in turns) for whose in ("server_cpu", "client_cpu"))
    cells = [
        f"{name}: {contender.name}{' (baseline)' if contender is baseline else ''}",
        contender.facts["versions"],
        f"{_rate(turns, lambda one: one.tokens):,.0f}",
        f"{_rate(turns, lambda one: 1):.2f}",
        _ends([1000 * one.first for one in served], ".0f"),
        _ends([1000 * one.a_token for one in served if one.tokens > 1], ".1f"),
        _ends([one.whole for one in served], ".2f"),
        f"{refused}, {len(asked) - len(served) - refused}",
        f"{contender.peak_bytes / 1e6:,.0f}",
        f"{cores / seconds:.2f}, {client / seconds:.1%}",
    ]
    if baseline:
        ratio = times_sooner(contender, baseline, place)
        cells.append("-" if ratio is None else f"{ratio:.2f}")
    return cells


def _rate(turns: Sequence[Mapping[str, Any]], count: Callable[[Outcome], int]) -> float:
    """A second, of what was served; median over rounds."""
    return statistics.median(
        sum(count(one) for one in _served(turn)) / turn["seconds"] for turn in turns
    )


def _served(turn: Mapping[str, Any]) -> list[Outcome]:
    return [one for one in (Outcome(*fields) for fields in turn["outcomes"]) if one.status == 200]


def _ends(values: Sequence[float], form: str) -> str:
    """Median, p90, p99 and the mean behind them."""
    if not values:
        return "-"
    ends = ", ".join(f"{percentile(values, share):{form}}" for share in SHARES)
    return f"{ends} ({statistics.mean(values):{form}})"


def times_sooner(one: Contender, other: Contender, place: int) -> float | None:
    """How many times as long the other's median request takes under a load, median over the rounds
    that both took part in; None if there was none in which both served.
    """
    ratios = []
    for turn, others in zip(one.loads, other.loads, strict=False):
        own, theirs = ([each.whole for each in _served(t[place])] for t in (turn, others))
        if own and theirs:
            ratios.append(statistics.median(theirs) / statistics.median(own))
    return statistics.median(ratios) if ratios else None


def _notes(contenders: Sequence[Contender]) -> list[str]:
    return [_note(one, max(len(each.loads) for each in contenders)) for one in contenders]


def _note(contender: Contender, rounds: int) -> str:
    took = len(contender.loads)
    found = [
        Outcome(*fields) for turn in contender.loads for load in turn for fields in load["outcomes"]
    ]
    served = [one for one in found if one.status == 200]
    line = f"{contender.name}, {contender.facts['versions']}: {len(found)} requests"
    if served:
        tokens = statistics.mean(one.tokens for one in served)
        prompt = statistics.mean(one.prompt for one in served)
        line += f", {tokens:.1f} tokens after prompts of {prompt:.1f} on average"
    line += f", sent at most {1000 * max(one.late for one in found):.1f} ms late"
    return line + (f"; ended after {took} of {rounds} rounds" if took < rounds else "")
