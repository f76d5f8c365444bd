"""What the promotion of FP8 tensor cores' sums to FP32 takes, and what other tensor cores would
save of it (report 3.3.2, 3.5.2).

Hopper's cores keep 14 bits of a sum, so CUDA cores add it to one in FP32 at every 128 products, and
multiply the scales of a group of 128 in the same operation: one FMA for each output. At the FP32
peak of the data sheet that takes

    2 FLOPs × outputs × K / 128 / peak,

beside 2 × outputs × K FLOPs of the product. How much of it is seen is published nowhere. Two
warpgroups take turns, one at promotion while the other multiplies (3.3.2), so between none of it
and all of it: both bounds are told. What moves sums out of the tensor cores, and products of two
scales, are not counted.

A sum of twice as many products makes as much error with one bit more. In the emulation of
experiments/accumulation_precision the RMS error of 14 bits and 128 products is 0.063 %, of 16 and
512 0.081 %, of 18 and 2,048 0.086 %, with operands of one sign and the register in the alignment;
otherwise it falls. So `bits` need a promotion at every 128 × 2^(bits - 14).
"""

import math
from dataclasses import dataclass

from dsv3_jax.config import RunConfig
from dsv3_jax.plan.hardware import Hardware, WhatIf
from dsv3_jax.plan.kernel_rates import Figure
from dsv3_jax.plan.products import Product, items_of
from dsv3_jax.plan.traffic import tokens_of_microbatch

BITS, INTERVAL = 14, 128
INSTRUCTION = 32  # products that a tensor core adds at once: no promotion comes between them
FEWEST_BITS, MOST_BITS = 12, 32  # of the first, sums of 32; with the second none is promoted
LONGEST_INTERVAL = 2**20
ONE_SCALE = ("fp8_per_tensor",)  # recipes without groups, which are of INTERVAL in all others


@dataclass(frozen=True)
class Promotion:
    """Of tensor cores that there are not; the measured ones have `BITS` and `INTERVAL`."""

    fp32: Figure
    """Peak of CUDA cores"""
    bits: int
    asked: int | None
    """Products between promotions; None for as many as bits allow"""
    group: int | None
    """Products whose scales CUDA cores multiply; None where they have none to multiply"""

    @property
    def allowed(self) -> int:
        """Products of a sum that `bits` make no more error of than 14 bits of 128."""
        return INTERVAL * 2**self.bits // 2**BITS

    @property
    def interval(self) -> int:
        """Products between promotions of a longer sum."""
        return self.asked or self.allowed

    def operations(self, inner: int) -> int:
        """FMAs for an output that is a sum of `inner` products."""
        promoted = math.ceil(inner / self.interval) if inner > self.interval else 0
        return max(promoted, math.ceil(inner / self.group) if self.group else 0)

    def saved(self, flops: float, inner: int) -> float:
        """Seconds of a product of so many FLOPs, of sums of `inner`: its FMAs that are not needed,
        if none of them was hidden; below 0 where more are.
        """
        fewer = math.ceil(inner / INTERVAL) - self.operations(inner)
        return flops / inner * fewer / self.fp32.value


def promotion_of(cfg: RunConfig, hardware: Hardware, what_if: WhatIf) -> Promotion | None:
    """None where nothing is asked about it. ValueError, one line, for what cannot be."""
    option = what_if.about_promotion
    if option is None:
        return None
    if not cfg.quant.recipe.startswith("fp8"):
        raise ValueError(
            f"{option} with quant.recipe {cfg.quant.recipe}; allowed: recipes of FP8, whose sums "
            "are promoted"
        )
    if hardware.fp32 is None:
        raise ValueError(f"{option} with --hardware {hardware.name}; allowed: h800, h100, h200")
    bits, asked = what_if.accumulator_bits, what_if.promotion_interval
    if bits is not None and not FEWEST_BITS <= bits <= MOST_BITS:
        raise ValueError(
            f"--what-if.accumulator-bits is {bits}; allowed: {FEWEST_BITS} to {MOST_BITS}"
        )
    if asked is not None and not (
        INSTRUCTION <= asked <= LONGEST_INTERVAL and asked % INSTRUCTION == 0
    ):
        raise ValueError(
            f"--what-if.promotion-interval is {asked}; allowed: multiples of {INSTRUCTION} up to "
            f"{LONGEST_INTERVAL:,}"
        )
    one_scale = cfg.quant.recipe in ONE_SCALE or what_if.group_scales
    group = None if one_scale else INTERVAL
    return Promotion(hardware.fp32, BITS if bits is None else bits, asked, group)


def longest_sum(cfg: RunConfig) -> tuple[str, int]:
    """Of all FP8 products of a model, forward and backward: which, and of how many products."""
    sums = {}
    for product in _low(cfg):
        tokens = tokens_of_microbatch(cfg) * (cfg.mesh.expert_shards if product.routed else 1)
        sums[f"Fprop of {product.name}"] = product.inner
        sums[f"Dgrad of {product.name}"] = product.columns
        sums[f"Wgrad of {product.name}"] = product.copies * tokens // product.weights
    name = max(sums, key=sums.__getitem__)
    return name, sums[name]


def bits_without(longest: int) -> int:
    """Of an accumulator that promotes no sum of so many products or fewer."""
    return BITS + max(0, math.ceil(math.log2(longest / INTERVAL)))


def most_of(cfg: RunConfig) -> Product:
    """The FP8 product that takes most of a model's FLOPs."""
    counted: dict[Product, int] = {}
    for product in _low(cfg):
        counted[product] = counted.get(product, 0) + product.flops
    return max(counted, key=counted.__getitem__)


def _low(cfg: RunConfig) -> list[Product]:
    return [p for item in items_of(cfg.model) for p in item.products if p.low]
