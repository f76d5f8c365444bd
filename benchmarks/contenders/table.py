"""The figures of a contest: one table in Markdown for people, one JSON file to keep.

Speeds are tokens/s of medians over rounds. A ratio is taken twice: `of rounds` is the median of
the ratios within each round, which slow spells of the machine hardly touch; `of medians` the ratio
of the medians. Where they differ by much, the machine was not quiet.
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contenders.side_by_side import TOO_SLOW, Contender

HEADINGS = ("", "versions", "tokens/s", "quartiles", "peak MB")


@dataclass(frozen=True)
class Peak:
    """What a machine could do: FLOP/s of its matrix products by group, FLOPs that a token needs."""

    flops_per_second: Mapping[str, float]
    flops_per_token: int


def speeds(contender: Contender) -> list[float]:
    """Tokens/s of each round; of the qualifying rounds where there were no others."""
    return [contender.tokens / s for s in contender.seconds or contender.qualifying]


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third, the extremes among them; both the value itself if it is alone."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def ratio_of_medians(one: Contender, other: Contender) -> float:
    """How many times faster `one` is."""
    return statistics.median(speeds(one)) / statistics.median(speeds(other))


def ratio_of_rounds(one: Contender, other: Contender) -> float | None:
    """The same as the median over rounds that both took part in; None if there were none."""
    pairs = zip(one.seconds, other.seconds, strict=False)
    ratios = [(one.tokens / a) / (other.tokens / b) for a, b in pairs]
    return statistics.median(ratios) if ratios else None


def baselines(contenders: Sequence[Contender], kind: str) -> dict[str, Contender]:
    """By group, the baselines whose name begins with `kind`."""
    return {c.group: c for c in contenders if c.is_baseline and c.name.startswith(kind)}


def table(
    contenders: Sequence[Contender], kinds: Sequence[str], peak: Peak | None = None
) -> list[str]:
    """Lines of Markdown: a row for each contender, two columns for each kind of baseline found."""
    found = {kind: baselines(contenders, kind) for kind in kinds}
    found = {kind: by_group for kind, by_group in found.items() if by_group}
    headings = [*HEADINGS]
    serves = any(c.waits for c in contenders)
    headings += ["seconds a request"] if serves else []
    for kind in found:
        headings += [f"× {kind}, of rounds", "of medians"]
    headings += ["of matmul peak"] if peak else []
    groups = list(dict.fromkeys(c.group for c in contenders))
    rows = [
        _row(c, [by_group.get(c.group) for by_group in found.values()], peak, serves)
        for group in groups
        for c in contenders
        if c.group == group
    ]
    return [*aligned([headings, *rows]), *_notes(contenders)]


def _row(
    contender: Contender, references: Sequence[Contender | None], peak: Peak | None, serves: bool
) -> list[str]:
    values = speeds(contender)
    low, high = quartiles(values)
    mark = " (baseline)" if contender.is_baseline else ""
    cells = [
        f"{contender.group}: {contender.name}{mark}{'' if contender.seconds else ' *'}",
        contender.facts["versions"],
        f"{statistics.median(values):,.0f}",
        f"{low:,.0f} to {high:,.0f}",
        f"{contender.peak_bytes / 1e6:,.0f}",
    ]
    if serves:
        cells.append(f"{statistics.median(contender.waits):.2f}" if contender.waits else "-")
    for other in references:
        if other is None:
            cells += ["-", "-"]
        else:
            of_rounds = ratio_of_rounds(contender, other)
            cells.append("-" if of_rounds is None else f"{of_rounds:.2f}")
            cells.append(f"{ratio_of_medians(contender, other):.2f}")
    if peak:
        flops = statistics.median(values) * peak.flops_per_token
        best = peak.flops_per_second.get(contender.group)
        cells.append(f"{flops / best:.1%}" if best else "-")
    return cells


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table that can be read as it is: names to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        return f"| {' | '.join([*left, *right])} |"

    rule = ["-" * width for width in widths[:2]] + ["-" * (width - 1) + ":" for width in widths[2:]]
    return [line(rows[0]), line(rule), *(line(row) for row in rows[1:])]


def _notes(contenders: Sequence[Contender]) -> list[str]:
    lines = []
    if any(not c.seconds for c in contenders):
        lines.append("* qualifying rounds only")
    rounds = max((len(c.seconds) for c in contenders), default=0)
    for c in contenders:
        if 0 < len(c.seconds) < rounds:
            lines.append(f"{c.group}: {c.name} ended after {len(c.seconds)} of {rounds} rounds")
        if c.is_baseline and not c.seconds:
            seconds = statistics.median(c.qualifying)
            lines.append(
                f"{c.group}: {c.name} takes {seconds:.0f} s a turn, more than {TOO_SLOW:.0f} s, "
                "and so has no more than the qualifying rounds"
            )
    return ["", *lines] if lines else []


def write_figures(
    path: Path,
    contenders: Sequence[Contender],
    lines: Sequence[str],
    *,
    interpreters: Sequence[str],
    **more: Any,
) -> None:
    """Everything measured, the printed lines and the command, without this machine's paths."""
    shown = dict.fromkeys(interpreters, "PYTHON") | {str(path): path.name}
    figures = {
        "command": command(sys.argv, shown),
        **more,
        "printed": list(lines),
        "contenders": [_kept(c) for c in contenders],
    }
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def command(arguments: Sequence[str], shown: Mapping[str, str]) -> str:
    """The command line with some values shown as others: paths that this machine alone has."""
    words = [f"benchmarks/{Path(arguments[0]).name}"]
    for argument in arguments[1:]:
        name, equals, value = argument.rpartition("=")
        words.append(f"{name}{equals}{shown.get(value, value)}")
    return " ".join(["python", *words])


def _kept(contender: Contender) -> dict[str, Any]:
    kept = {
        "name": contender.name,
        "group": contender.group,
        "is_baseline": contender.is_baseline,
        "facts": contender.facts,
        "tokens": contender.tokens,
        "qualifying_seconds": contender.qualifying,
        "seconds": contender.seconds,
        "waits": contender.waits,
        "peak_bytes": contender.peak_bytes,
    }
    if contender.loads:  # whose tokens are told there, and are others in every turn
        return kept | {"loads": contender.loads}
    return kept | {"tokens_per_second": statistics.median(speeds(contender))}
