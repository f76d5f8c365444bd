"""What rewards said of many attempts, exactly, and how the attempts' style and length changed."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dsv3_jax.posttrain.attempts import Attempt
from dsv3_jax.posttrain.rewards import Total
from dsv3_jax.posttrain.sample_statistics import lengths, of_texts

_MOST_REASONS = 10


def style(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Lengths and formats of whole turns, and how many were cut."""
    counted = [one.tokens for one in attempts if one.tokens is not None]
    found = of_texts([one.whole for one in attempts], counted)
    return found | {"cut": sum(one.cut for one in attempts)}


def reward_statistics(attempts: Sequence[Attempt], totals: Sequence[Total]) -> dict[str, Any]:
    """Of the sum and of each part: count, mean, deviation, percentiles, failures and why."""
    names = list(totals[0].parts) if totals else []
    parts = {name: [one.parts[name] for one in totals] for name in names}
    return {
        "attempts": len(attempts),
        "total": _numbers([one.value for one in totals]),
        "failed": sum(one.failed for one in totals),
        "parts": {
            name: {
                **(_numbers([one.value for one in rated]) or {}),
                "failed": sum(one.failed for one in rated),
                "failures": dict(
                    Counter(one.reason for one in rated if one.failed).most_common(_MOST_REASONS)
                ),
            }
            for name, rated in parts.items()
        },
        "texts": style(attempts),
    }


def _numbers(values: Sequence[float]) -> dict[str, float] | None:
    """As `lengths`, with the population's standard deviation."""
    found = lengths(values)
    if found is None:
        return None
    mean = math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
    return found | {"total": math.fsum(values), "mean": mean, "deviation": spread}


def style_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Of two `style`s: rows of name, before, after. Lengths as mean, p50, p90 and most; formats as
    shares.
    """
    rows = [("answers", *(f"{one['count']:,}" for one in (before, after)))]
    for unit in ("characters", "words", "tokens"):
        for field in ("mean", "p50", "p90", "most"):
            numbers = [one[unit] and one[unit][field] for one in (before, after)]
            if any(number is not None for number in numbers):
                rows.append((f"{unit}, {field}", *map(_number, numbers)))
    shares = {name: [one["formats"][name] for one in (before, after)] for name in before["formats"]}
    for name, counts in {"cut": [before["cut"], after["cut"]], **shares}.items():
        sizes = (before["count"], after["count"])
        rows.append((name, *(_share(n, size) for n, size in zip(counts, sizes, strict=True))))
    return rows


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}".removesuffix(".0")


def _share(count: int, size: int) -> str:
    return f"{count / size:.1%}" if size else "–"
