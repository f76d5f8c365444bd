"""Parts of arrays: where they begin and how large they are."""

import math
from typing import NamedTuple

import numpy as np


class Box(NamedTuple):
    """A part of an array: where it begins and its shape, with all of the array's dimensions."""

    starts: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """That take it out of the array."""
        return tuple(
            slice(start, start + size) for start, size in zip(self.starts, self.shape, strict=True)
        )

    def index(self, index: tuple[int, ...]) -> tuple[int, ...] | None:
        """What `index`, of the array's first dimensions, is in this part; None if not in it."""
        inside = [(i - start, size) for i, start, size in zip(index, *self, strict=False)]
        return tuple(i for i, _ in inside) if all(0 <= i < n for i, n in inside) else None

    def within(self, other: "Box") -> "Box | None":
        """What both have in common, as a part of `other`; None if nothing."""
        starts = np.maximum(self.starts, other.starts).astype(int)
        ends = np.minimum(np.add(*self), np.add(*other)).astype(int)
        if (ends <= starts).any():
            return None
        offsets = starts - np.array(other.starts, int)
        return Box(tuple(offsets.tolist()), tuple((ends - starts).tolist()))


def box_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    """The part of an array of this shape that slices of all its dimensions name."""
    ranges = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
    return Box(tuple(r.start for r in ranges), tuple(map(len, ranges)))


def whole(shape: tuple[int, ...]) -> Box:
    """All of an array."""
    return Box((0,) * len(shape), tuple(shape))
