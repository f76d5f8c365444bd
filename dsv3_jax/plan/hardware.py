"""Devices as data: peaks, bandwidths, what kernels achieve on them, each with its source.

Only devices with sourced figures are here. The kernels' figures are those of DeepSeek's first
public releases (February 2025), the nearest in time to the report's job. What has no source is
assumed, and `Hardware.assumed` says so in words that the plan prints. Bandwidths are one way, per
device.
"""

from dataclasses import dataclass, replace

from dsv3_jax.plan.kernel_rates import (
    DEEPEP,
    DEEPEP_LOW_LATENCY,
    DEEPGEMM,
    Figure,
    GemmRate,
    LinkRate,
    PairLatency,
)

REPORT = "report 3.2.2, 3.5.1"
H100_SHEET = "NVIDIA H100 SXM5 data sheet figures, glennklockwood.com/garden/processors/h100"
H200_SYSTEM = (
    "NVIDIA's MLPerf system description, github.com/mlcommons/inference_results_v4.1 "
    "H200-SXM-141GBx8"
)
H200_SHEET = "openmetal.io/resources/blog/how-the-h200-is-built-for-memory-bound-ai-workloads"
LINK_BOUNDS = 0.001, 1e6  # GB/s that can be asked for: far below and above what there is
FLASH_MLA = "FlashMLA on H800, CUDA 12.8, first release"


@dataclass(frozen=True)
class Hardware:
    """One kind of device in nodes of several. Rates in 1/s, sizes in bytes."""

    name: str
    bf16: Figure
    """Peak of BF16 matrix products, dense"""
    fp8: Figure
    """Peak of FP8 matrix products, dense"""
    memory: Figure
    """Bytes of device memory"""
    memory_bandwidth: Figure
    """Peak of device memory"""
    streamed: Figure
    """What a kernel that only moves memory achieves of it"""
    nvlink: Figure
    """Effective, to other devices of the node"""
    ib: Figure
    """Effective, to other nodes"""
    devices_per_node: Figure
    sms: Figure
    """Streaming multiprocessors"""
    comm_sms: Figure
    """Of these, taken by communication while it runs beside computation"""
    gemm_fp8: tuple[GemmRate, ...]
    """Achieved by measured products"""
    gemm_bf16: Figure
    """Achieved by products that are not in FP8"""
    attention: Figure
    """Achieved by core attention"""
    exchange: tuple[LinkRate, ...]
    """Achieved by the expert exchange, by number of devices that share the experts"""
    low_latency: tuple[PairLatency, ...]
    """Of the exchange while decoding"""
    gemm_float32: Figure | None = None
    """Achieved by float32 products, where that is known"""
    fp32: Figure | None = None
    """Peak of FP32 outside of tensor cores, to which FP8 sums are promoted, where they are"""
    price: Figure | None = None
    """US dollars per device-hour"""
    assumed: tuple[str, ...] = ()
    """In place of what has no source"""

    @property
    def slower(self) -> float:
        """Factor on computation beside which communication holds its SMs."""
        return self.sms.value / (self.sms.value - self.comm_sms.value)


@dataclass(frozen=True)
class WhatIf:
    """Other hardware than there is (report 3.5). None and False leave a figure as it is.

    What is asked about promotion to FP32 gives bounds (`plan/promotion.py`): DeepGEMM's rates
    contain it, and how much of it is seen is unpublished.
    """

    comm_sms: int | None = None
    """SMs that communication takes: 20 of 132 in the report; 0 is its wish for a co-processor"""
    fused_cast: bool = False
    """Quantise on the way into the tensor core: no pass over device memory for it"""
    nvlink: float | None = None
    """GB/s one way, per device"""
    ib: float | None = None
    """GB/s one way, per device"""
    accumulator_bits: int | None = None
    """Of FP8 tensor cores' sums: 14 in the report; each one more doubles the sum that needs no
    promotion to FP32"""
    promotion_interval: int | None = None
    """Products between promotions: 128 in the report; default: as many as accumulator bits allow"""
    group_scales: bool = False
    """Tensor cores multiply the scales of groups of 128, which CUDA cores do at each group's end
    otherwise, promotion or not"""

    @property
    def about_promotion(self) -> str | None:
        """The first option that asks about the promotion of FP8 sums, if any does."""
        for name in ("accumulator_bits", "promotion_interval", "group_scales"):
            if (asked := getattr(self, name)) is not None and asked is not False:
                return f"--what-if.{name.replace('_', '-')}"
        return None


def hardware_named(name: str) -> Hardware:
    """One of `NAMES` but cpu, which is measured. ValueError for another."""
    if name not in DEVICES:
        raise ValueError(f"--hardware is {name!r}; allowed: {', '.join(NAMES)}")
    return DEVICES[name]


def changed(hardware: Hardware, what_if: WhatIf) -> Hardware:
    """With the asked figures; measured rates of the exchange grow with the link they go over.

    ValueError for figures that cannot be.
    """
    changes = {}
    if what_if.comm_sms is not None:
        sms = int(hardware.sms.value)
        if not 0 <= what_if.comm_sms < sms:
            raise ValueError(
                f"--what-if.comm-sms is {what_if.comm_sms}; allowed: 0 to {sms - 1} of "
                f"{hardware.name}'s {sms}"
            )
        changes["comm_sms"] = Figure(what_if.comm_sms, "what-if")
    speed = {"nvlink": 1.0, "ib": 1.0}
    for link in speed:
        gigabytes = getattr(what_if, link)
        if gigabytes is None:
            continue
        low, high = LINK_BOUNDS
        if not low <= gigabytes <= high:
            raise ValueError(
                f"--what-if.{link} is {gigabytes:g}; allowed: {low:g} to {high:,.0f} GB/s"
            )
        changes[link] = Figure(gigabytes * 1e9, "what-if")
        speed[link] = gigabytes * 1e9 / getattr(hardware, link).value
    rates = tuple(_faster(rate, speed[rate.link]) for rate in hardware.exchange)
    waits = tuple(_sooner(wait, speed["ib"]) for wait in hardware.low_latency)
    return replace(hardware, exchange=rates, low_latency=waits, **changes)


def _sooner(wait: PairLatency, factor: float) -> PairLatency:
    if factor == 1:
        return wait
    return replace(
        wait,
        dispatch=wait.dispatch / factor,
        combine=wait.combine / factor,
        source=f"{wait.source}, / {factor:.3g} what-if",
    )


def _faster(rate: LinkRate, factor: float) -> LinkRate:
    if factor == 1:
        return rate
    return replace(
        rate,
        dispatch=rate.dispatch * factor,
        combine=rate.combine * factor,
        source=f"{rate.source}, × {factor:.3g} what-if",
    )


H800 = Hardware(
    name="h800",
    bf16=Figure(989.5e12, "FlashMLA: about 990; 989.5 under the MFU of arXiv 2505.09343, Table 4"),
    fp8=Figure(1978.9e12, f"the H100's, of one chip: {H100_SHEET}"),
    memory=Figure(80e9, "huggingface.co/hardware/h800"),
    memory_bandwidth=Figure(3.35e12, "FlashMLA's write-up of its H800 kernels"),
    streamed=Figure(3.0e12, f"{FLASH_MLA}, memory-bound"),
    nvlink=Figure(160e9, REPORT),
    ib=Figure(50e9, REPORT),
    devices_per_node=Figure(8, "report 3.1"),
    sms=Figure(132, REPORT),
    comm_sms=Figure(20, REPORT),
    gemm_fp8=DEEPGEMM,
    gemm_bf16=Figure(580e12, "assumed: as core attention, the sourced BF16 figure"),
    attention=Figure(580e12, f"{FLASH_MLA}, compute-bound"),
    exchange=DEEPEP,
    low_latency=DEEPEP_LOW_LATENCY,
    fp32=Figure(66.9e12, f"the H100's, of one chip: {H100_SHEET}"),
    price=Figure(2.0, "report, Table 1"),
    assumed=(
        "BF16 products run at FlashMLA's 580 TFLOPS: no sourced BF16 GEMM",
        "core attention of training, forward and backward, runs at FlashMLA's decoding rate",
        "Dgrad and Wgrad run at the rate of Fprop: the first release timed only that",
    ),
)
_SAME_CHIP = "kernels achieve what they do on H800, of the same GH100 chip"
_EFFECTIVE = "NVLink gives 40% of its nominal two-way rate, as H800's 160 of 400 GB/s"
_CLUSTER = "one 400 Gb/s InfiniBand card a device, as in DeepSeek's cluster"
H100 = replace(
    H800,
    name="h100",
    bf16=Figure(989.4e12, H100_SHEET),
    fp8=Figure(1978.9e12, H100_SHEET),
    memory=Figure(80e9, H100_SHEET),
    memory_bandwidth=Figure(3.35e12, H100_SHEET),
    nvlink=Figure(360e9, f"assumed: 40% of 900 GB/s; {H100_SHEET}"),
    ib=Figure(50e9, "assumed: DeepSeek's cluster"),
    sms=Figure(132, H100_SHEET),
    fp32=Figure(66.9e12, H100_SHEET),
    exchange=tuple(_faster(r, 2.25 if r.link == "nvlink" else 1.0) for r in DEEPEP),
    price=None,
    assumed=(*H800.assumed, _SAME_CHIP, _EFFECTIVE, _CLUSTER),
)
H200 = replace(
    H100,
    name="h200",
    memory=Figure(141e9, H200_SYSTEM),
    memory_bandwidth=Figure(4.8e12, H200_SHEET),
    streamed=Figure(4.8e12 * 3.0 / 3.35, "assumed: the share of its peak that H800 achieves"),
    nvlink=Figure(360e9, f"assumed: 40% of 900 GB/s; {H200_SYSTEM}"),
    assumed=(*H100.assumed, "peaks of compute are the H100's, of the same chip"),
)
DEVICES = {hardware.name: hardware for hardware in (H800, H100, H200)}
NAMES = (*DEVICES, "cpu")
