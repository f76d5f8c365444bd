"""The part of a run's page about low precision: what is lost, by kind of tensor and over time."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

from dsv3_jax.drawing import BLUE, GREEN, ORANGE
from dsv3_jax.train.page_pictures import LARGE, Curve, Picture, draw, frame_of, of_kind
from dsv3_jax.train.quant_health import KINDS, Health

COLORS = dict(zip(KINDS, (BLUE, GREEN, ORANGE), strict=True))
HEADS = (
    "tensors", "parameter", "layers", "underflow, mean", "worst", "in", "saturated", "not finite",
    "scales",
)  # fmt: skip


class Named(NamedTuple):
    """One tensor of one layer."""

    layer: str
    health: Health


def table(entries: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Rows below `HEADS`, from the newest entry: each kind of tensor of each parameter over all its
    layers. Empty for runs without low precision.
    """
    found = of_kind(entries, "quant")
    if not found:
        return []
    groups: dict[tuple[str, str], list[Named]] = {}
    for name, kinds in found[-1]["layers"].items():
        layer, parameter = _parted(name)
        for kind, values in kinds.items():
            groups.setdefault((kind, parameter), []).append(Named(layer, _health(values)))
    return [_row(*key, groups[key]) for key in sorted(groups, key=_order)]


def pictures(entries: Sequence[dict[str, Any]]) -> list[Picture]:
    """Underflow over the run, and the range of scales."""
    found = of_kind(entries, "quant")
    if not found:
        return []
    tokens = [float(entry["tokens"]) for entry in found]
    shares, ranges = [], []
    for kind in KINDS:
        by_entry = [[_health(kinds[kind]) for kinds in entry["layers"].values()] for entry in found]
        means = [100 * fmean(h.underflow for h in healths) for healths in by_entry]
        shares.append(Curve(kind, COLORS[kind], tokens, means, _MARKED))
        for label, ends in (
            (kind, [_scales(healths)[0] for healths in by_entry]),
            ("", [_scales(healths)[1] for healths in by_entry]),
        ):
            ranges.append(Curve(label, COLORS[kind], tokens, ends, _MARKED))
    frame = frame_of(entries)
    drawn = [
        draw("Underflow, % of what is not 0, mean of all layers", shares, frame, LARGE, zero=True),
    ]
    if any(math.isfinite(y) for curve in ranges for y in curve.y):
        drawn.append(draw("Smallest and largest scale", ranges, frame, LARGE, log=True))
    return [picture for picture in drawn if picture]


_MARKED = {"marker": "o", "markersize": 3}


def _parted(name: str) -> tuple[str, str]:
    """layers.3.moe.w_up_EDF -> layers.3, moe.w_up_EDF; MTP's block is a layer too."""
    first, second, rest = name.split(".", 2)
    return f"{first}.{second}", rest.removeprefix("block.")


def _order(key: tuple[str, str]) -> tuple[int, str]:
    kind, parameter = key
    return KINDS.index(kind), parameter


def _health(values: Sequence[float | None]) -> Health:
    """What was not finite is null in the file."""
    return Health(*(math.nan if value is None else value for value in values))


def _row(kind: str, parameter: str, tensors: Sequence[Named]) -> tuple[str, ...]:
    healths = [tensor.health for tensor in tensors]
    worst = max(tensors, key=lambda tensor: tensor.health.underflow)
    saturated, bad = max(h.saturation for h in healths), max(h.not_finite for h in healths)
    low, high = _scales(healths)
    return (
        kind, parameter, str(len(tensors)), _share(fmean(h.underflow for h in healths)),
        _share(worst.health.underflow), worst.layer if worst.health.underflow else "",
        _share(saturated), _share(bad),
        f"{low:.2g} to {high:.2g}" if math.isfinite(low) else "–",
    )  # fmt: skip


def _scales(healths: Sequence[Health]) -> tuple[float, float]:
    """Smallest and largest; NaN where there is nothing but zeros."""
    known = [h for h in healths if math.isfinite(h.smallest_scale)]
    if not known:
        return math.nan, math.nan
    return min(h.smallest_scale for h in known), max(h.largest_scale for h in known)


def _share(value: float) -> str:
    return f"{100 * value:.2g} %" if value else "0"
