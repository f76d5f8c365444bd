"""What DeepSeek's public kernels achieve on H800, and which measurement stands for a given size.

First releases of DeepGEMM, FlashMLA and DeepEP, February 2025, CUDA 12.8, H800 with one 400 Gb/s
card a device. A size between two measured ones takes the nearer one's rate, in powers of two.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Figure:
    """A number and where it is from."""

    value: float
    source: str


@dataclass(frozen=True)
class GemmRate:
    """Achieved by `groups` products [rows, inner] × [inner, columns], in FLOP/s."""

    columns: int
    inner: int
    rows: int
    flops: float
    groups: int = 0
    """0 for one dense product"""
    source: str = "DeepGEMM, first release"

    def __str__(self) -> str:
        groups = f"{self.groups} groups of " * (self.groups > 0)
        return f"{self.source}: {groups}{self.rows} rows, {self.columns} × {self.inner}"


@dataclass(frozen=True)
class LinkRate:
    """Of an exchange among so many devices, in bytes/s of the link that bounds it.

    DeepEP counts a token once for every node it goes to, the sender's own among them.
    """

    devices: int
    link: Literal["nvlink", "ib"]
    dispatch: float
    combine: float
    source: str = "DeepEP, first release"


@dataclass(frozen=True)
class PairLatency:
    """Seconds of a dispatch and of a combine of 128 tokens a device, each to 8 experts."""

    devices: int
    dispatch: float
    combine: float
    source: str = "DeepEP low latency, first release"


def _dense(columns: int, inner: int, *tera: int) -> list[GemmRate]:
    rows = (64, 128, 4096)
    return [GemmRate(columns, inner, r, t * 1e12) for r, t in zip(rows, tera, strict=True)]


def _grouped(groups: int, rows: int, up: int, down: int) -> list[GemmRate]:
    return [
        GemmRate(4096, 7168, rows, up * 1e12, groups),
        GemmRate(7168, 2048, rows, down * 1e12, groups),
    ]


DEEPGEMM = (
    *_dense(2112, 7168, 206, 352, 1058),
    *_dense(24576, 1536, 289, 535, 990),
    *_dense(32768, 512, 219, 358, 590),
    *_dense(7168, 16384, 336, 645, 1358),
    *_dense(4096, 7168, 287, 533, 1304),
    *_dense(7168, 2048, 295, 510, 1025),
    *_grouped(4, 8192, 1297, 1099),
    *_grouped(8, 4096, 1288, 1093),
    *_grouped(1, 1024, 1233, 925),
    *_grouped(2, 512, 1040, 916),
    *_grouped(4, 256, 932, 815),
)
DEEPEP = (
    LinkRate(8, "nvlink", 153e9, 158e9),
    LinkRate(16, "ib", 43e9, 43e9),
    LinkRate(32, "ib", 44e9, 47e9),
    LinkRate(64, "ib", 46e9, 45e9),
)
DEEPEP_LOW_LATENCY = tuple(
    PairLatency(devices, dispatch * 1e-6, combine * 1e-6)
    for devices, dispatch, combine in (
        (8, 163, 318),
        (16, 173, 329),
        (32, 182, 350),
        (64, 186, 353),
        (128, 192, 369),
        (256, 194, 360),
    )
)


def nearest_gemm(
    rates: Sequence[GemmRate], rows: float, inner: int, columns: int, grouped: bool
) -> GemmRate:
    """The measurement whose sizes are nearest, each in powers of two: of a grouped product among
    the grouped ones, of a dense one among the dense ones, where there are both.
    """
    kept = [rate for rate in rates if grouped == (rate.groups > 0)] or rates
    return min(
        kept,
        key=lambda r: (
            _octaves(r.columns, columns) + _octaves(r.inner, inner) + _octaves(r.rows, rows)
        ),
    )


def nearest_link(rates: Sequence[LinkRate], devices: int, link: str) -> LinkRate:
    """Of the rows of that link, the one with the nearest number of devices."""
    kept = [rate for rate in rates if rate.link == link]
    return min(kept, key=lambda rate: _octaves(rate.devices, devices))


def nearest_latency(rates: Sequence[PairLatency], devices: int) -> PairLatency:
    """The row with the nearest number of devices."""
    return min(rates, key=lambda rate: _octaves(rate.devices, devices))


def _octaves(one: float, other: float) -> float:
    return abs(math.log2(one / other))
