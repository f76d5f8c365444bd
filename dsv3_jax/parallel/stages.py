"""How a model is cut into the stages of a pipeline (report 3.2.1); knows no JAX.

A model is a row of items: embedding E, layers, final norm and head H, MTP modules M. A stage is a
stretch of them. `cut` takes a written form, `E+4|4|4|3+H+M`, or balances the cost of stages.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

FORM = "stages between |, each items joined by +: E, a number of layers, H, M; such as E+2|2|1+H+M"


@dataclass(frozen=True)
class Cut:
    """The part of a model that one stage holds."""

    first_layer: int
    end_layer: int
    embed: bool
    """Whether tokens enter here"""
    head: bool
    """Whether the final norm and the main loss are here"""
    first_mtp: int
    end_mtp: int

    @property
    def num_mtp(self) -> int:
        return self.end_mtp - self.first_mtp

    @property
    def has_mtp(self) -> bool:
        return self.num_mtp > 0

    def layers(self, first: int, end: int) -> range:
        """Of those from `first` to `end` the ones that are here."""
        return range(max(first, self.first_layer), min(end, self.end_layer))

    def __str__(self) -> str:
        count = self.end_layer - self.first_layer
        mtp = ["M"] * self.num_mtp
        return "+".join(["E"] * self.embed + [str(count)] * (count > 0) + ["H"] * self.head + mtp)


def whole(num_layers: int, mtp_depth: int) -> Cut:
    """A model in one piece."""
    return Cut(0, num_layers, True, True, 0, mtp_depth)


def cut(
    written: str, stages: int, num_layers: int, mtp_depth: int, costs: Sequence[float]
) -> tuple[Cut, ...]:
    """The cuts of so many stages, as written, or balanced by the items' costs if nothing is.

    `costs` are of E, every layer, H, every M. ValueError for what is no cut of this model.
    """
    items = ["E", *["L"] * num_layers, "H", *["M"] * mtp_depth]
    if stages > len(items):
        raise ValueError(
            f"the model has {len(items)} items to cut (embedding, {num_layers} layers, head, "
            f"{mtp_depth} MTP modules); allowed: at most as many stages, and {stages} are asked for"
        )
    sizes = _sizes_of(written, stages, items) if written else balanced(costs, stages)
    cuts, start = [], 0
    for size in sizes:
        cuts.append(_cut_of(items, start, start + size))
        start += size
    return tuple(cuts)


def balanced(costs: Sequence[float], stages: int) -> list[int]:
    """Numbers of items in each stage, none empty, whose dearest stage costs least; among those the
    later stages get less, as they wait for fewer micro-batches.
    """
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    count = len(costs)
    # best[s][i]: the least possible cost of the dearest of s stages that hold the first i items.
    best = [[float("inf")] * (count + 1) for _ in range(stages + 1)]
    back = [[0] * (count + 1) for _ in range(stages + 1)]
    best[0][0] = 0.0
    for s in range(1, stages + 1):
        for i in range(s, count + 1):
            for j in range(s - 1, i):
                dearest = max(best[s - 1][j], total[i] - total[j])
                if dearest <= best[s][i]:
                    best[s][i], back[s][i] = dearest, j
    sizes, i = [], count
    for s in range(stages, 0, -1):
        sizes.append(i - back[s][i])
        i = back[s][i]
    return sizes[::-1]


def _sizes_of(written: str, stages: int, items: Sequence[str]) -> list[int]:
    parts = [part.split("+") for part in written.replace(" ", "").split("|")]
    for word in (word for part in parts for word in part):
        if not re.fullmatch(r"[EHM]|[1-9][0-9]*", word):
            raise ValueError(f"{written!r} has a stage with {word!r}; allowed: {FORM}")
    if len(parts) != stages:
        raise ValueError(
            f"{written!r} has {len(parts)} stage{'s' * (len(parts) > 1)}; allowed here: {stages}"
        )
    most = len(items) + 1  # a longer run of layers would only take memory
    spelt = [
        ["L"] * min(int(word), most) if word.isdigit() else [word]
        for part in parts
        for word in part
    ]
    if [item for word in spelt for item in word] != list(items):
        layers = items.count("L")
        modules = "".join("+M" for item in items if item == "M")
        raise ValueError(
            f"{written!r} is no cut of this model; allowed: cuts of E+{layers}+H{modules}"
        )
    return [sum(int(word) if word.isdigit() else 1 for word in part) for part in parts]


def _cut_of(items: Sequence[str], start: int, end: int) -> Cut:
    before, here = items[:start], items[start:end]
    layer, mtp = before.count("L"), before.count("M")
    return Cut(layer, layer + here.count("L"), "E" in here, "H" in here, mtp, mtp + here.count("M"))
