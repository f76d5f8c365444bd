"""How long a device takes for an item of the model: products, attention, casts, exchange.

Every time is bytes or FLOPs over an achieved rate. What is `NOT_COUNTED` has no sourced rate, so a
prediction is below what a run takes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dsv3_jax.config import RunConfig
from dsv3_jax.plan.hardware import Hardware
from dsv3_jax.plan.kernel_rates import nearest_gemm, nearest_link
from dsv3_jax.plan.products import Item, Product, scores_flops
from dsv3_jax.plan.promotion import Promotion
from dsv3_jax.plan.traffic import ITEM_BYTES, exchange_of, gather_of, tokens_of_microbatch

NOT_COUNTED = (
    "norms, activation functions, choice of experts, order of rows, launches, uneven routing, "
    "waiting for the slowest device, evaluation, checkpoints, restarts"
)
EXPANSION = "kv up"  # the product that makes keys and values of latents
CAST = 2 + 1 + 4 / 128  # bytes a number: BF16 read, E4M3 and its scale written (report 3.5.2)
RETILE = 2 * (1 + 4 / 128)  # 1×128 read, 128×1 written, for Wgrad


@dataclass(frozen=True)
class Part:
    """One term of a time."""

    name: str
    work: float
    """FLOPs or bytes"""
    rate: float
    """Per second"""
    source: str
    unit: str = "FLOPs"

    @property
    def seconds(self) -> float:
        return self.work / self.rate


@dataclass(frozen=True)
class Time:
    """Seconds of computation and of the exchange, before it is known whether they overlap."""

    compute: float = 0.0
    exchange: float = 0.0

    def __add__(self, other: "Time") -> "Time":
        return Time(self.compute + other.compute, self.exchange + other.exchange)

    @property
    def alone(self) -> float:
        """Without overlap."""
        return self.compute + self.exchange


@dataclass(frozen=True)
class Job:
    """A run on a kind of device; what every time below is of."""

    cfg: RunConfig
    hardware: Hardware
    fused_cast: bool = False
    promotion: Promotion | None = None
    """Of FP8 sums, where another one is asked for, and none of the measured one was hidden"""

    @property
    def tokens(self) -> int:
        """Of a device's micro-batch."""
        return tokens_of_microbatch(self.cfg)

    @property
    def item_bytes(self) -> int:
        """Of a number that is not in FP8."""
        return ITEM_BYTES[self.cfg.train.dtype]

    @property
    def fp8(self) -> bool:
        return self.cfg.quant.recipe.startswith("fp8")


def check_job(job: Job) -> None:
    """ValueError for a run that these devices' figures say nothing of."""
    hardware, cfg = job.hardware, job.cfg
    if cfg.mesh.local > hardware.devices_per_node.value:
        raise ValueError(
            f"mesh.local is {cfg.mesh.local}; allowed with --hardware {hardware.name}: at most the "
            f"{hardware.devices_per_node.value:.0f} devices of a node"
        )
    rates = {"bfloat16": hardware.gemm_bf16, "float32": hardware.gemm_float32}
    if not rates.get(cfg.train.dtype):
        raise ValueError(
            f"train.dtype is {cfg.train.dtype}; allowed with --hardware {hardware.name}: "
            f"{', '.join(name for name, rate in rates.items() if rate)}, of which a rate is known"
        )


def forward_parts(job: Job, item: Item) -> list[Part]:
    """Computation of a micro-batch's forward pass."""
    parts = []
    for product in _products(job, item):
        part = product_part(job, product)
        gradients = [f"{part.name}, Dgrad", f"{part.name}, Wgrad"] * product.at_once
        parts += [part, *(replace(part, name=name) for name in gradients)]
    parts += _looked_up(job, item, "rows looked up")
    if item.attends:
        flops = scores_flops(job.cfg.model, job.cfg.data.length) * job.tokens
        attention = job.hardware.attention
        parts.append(Part("core attention", flops, attention.value, attention.source))
    return parts + _casts(job, item, "FP8 casts of inputs", CAST, of_inputs=True)


def input_gradient_parts(job: Job, item: Item) -> list[Part]:
    """Computation of b: Dgrad of every product, attention's backward pass, what is recomputed."""
    parts = _backward_products(job, item)
    if job.cfg.mesh.row_shards > 1:  # W of what is expanded block by block is made with b
        expanded = [part for part in parts if part.name == EXPANSION]
        parts += [replace(part, name=f"{EXPANSION}, Wgrad") for part in expanded]
    if item.attends:
        model, attention = job.cfg.model, job.hardware.attention
        qk, v = model.nope_dim + model.rope_dim, model.v_dim
        # Scores again, and gradients of weights, values, queries and keys.
        factor = (3 * qk + 2 * v) / (qk + v)
        flops = factor * scores_flops(model, job.cfg.data.length) * job.tokens
        parts.append(Part("core attention", flops, attention.value, attention.source))
    parts += _casts(job, item, "FP8 casts of gradients", CAST, of_inputs=False)
    return parts + list(_recomputed(job, item))


def weight_gradient_parts(job: Job, item: Item) -> list[Part]:
    """Computation of W: one product for each of the forward pass."""
    parts = _backward_products(job, item) + _looked_up(job, item, "rows added to")
    if job.cfg.mesh.row_shards > 1:
        parts = [part for part in parts if part.name != EXPANSION]
    for name, inputs in (("inputs", True), ("gradients", False)):
        parts += _casts(job, item, f"{name} in blocks of 128×1", RETILE, of_inputs=inputs)
    return parts


def _backward_products(job: Job, item: Item) -> list[Part]:
    return [product_part(job, product) for product in _products(job, item) if not product.at_once]


def _products(job: Job, item: Item) -> list[Product]:
    """An item's products as one device makes them: of a shared row each device expands the latents
    of all tokens, or nearly so.
    """
    shards = job.cfg.mesh.row_shards
    return [
        replace(product, copies=shards * product.copies) if product.name == EXPANSION else product
        for product in item.products
    ]


def _looked_up(job: Job, item: Item, name: str) -> list[Part]:
    """Rows of the embedding that are read and written."""
    if not item.table:
        return []
    moved = 2 * job.item_bytes * job.cfg.model.d_model * job.tokens
    streamed = job.hardware.streamed
    return [Part(name, moved, streamed.value, streamed.source, "bytes")]


def product_part(job: Job, product: Product) -> Part:
    """At the rate of the nearest measured product, or its traffic with memory if that takes longer,
    as it does for products far smaller than those.
    """
    low, hardware = job.fp8 and product.low, job.hardware
    flops, rows = product.flops * job.tokens, product.copies * job.tokens
    held = product.weights // job.cfg.mesh.expert_shards if product.routed else 1
    if low:  # balanced: each expert has as many rows
        rate = nearest_gemm(
            hardware.gemm_fp8, rows / held, product.inner, product.columns, product.routed
        )
        computed = Part(product.name, flops, rate.flops, str(rate))
        if job.promotion:
            seconds = computed.seconds - job.promotion.saved(flops, product.inner)
            computed = replace(computed, rate=flops / seconds)
    else:
        wide = job.cfg.train.dtype != "bfloat16"
        figure = hardware.gemm_float32 if wide else hardware.gemm_bf16
        assert figure, "check_job lets nothing else pass"
        computed = Part(product.name, flops, figure.value, figure.source)
    read = (held * product.inner * product.columns + rows * product.inner) * (
        1 if low else job.item_bytes
    )
    moved = read + job.item_bytes * rows * product.columns
    streamed = hardware.streamed
    traffic = Part(product.name, moved, streamed.value, streamed.source, "bytes")
    return max(computed, traffic, key=lambda part: part.seconds)


def _casts(job: Job, item: Item, name: str, cost: float, of_inputs: bool) -> list[Part]:
    """Passes over device memory that quantise; none if they are fused with what is around them."""
    if not job.fp8 or job.fused_cast:
        return []
    low = [product for product in item.products if product.low]
    numbers = sum(p.copies * (p.inner if of_inputs else p.columns) for p in low)
    if not numbers:
        return []
    streamed = job.hardware.streamed
    return [Part(name, cost * numbers * job.tokens, streamed.value, streamed.source, "bytes")]


def _recomputed(job: Job, item: Item) -> Iterator[Part]:
    """Of the forward pass, again: MLA's up-projections (3.2.3), or all of a layer."""
    remat, again = job.cfg.train.remat, {"q", "q up", EXPANSION}
    if job.cfg.mesh.row_shards > 1 and remat == "none":
        remat, again = "report", {EXPANSION}
    if not item.attends or remat == "none":
        return
    for part in forward_parts(job, item):
        if remat == "full" or part.name in again:
            yield replace(part, name=f"{part.name}, again")


def exchange_parts(job: Job, backward: bool = False) -> list[Part]:
    """Dispatch and combine of one MoE layer and micro-batch, forward, or their mirrors."""
    traffic = exchange_of(job.cfg)
    if traffic is None:
        return []
    there = traffic.gradient_dispatch if backward else traffic.dispatch
    mesh, hardware = job.cfg.mesh, job.hardware
    link = "ib" if traffic.nodes > 1 else "nvlink"
    rate = nearest_link(hardware.exchange, mesh.expert_shards, link)
    parts = []
    for name, row, speed in (
        ("dispatch", there, rate.dispatch),
        ("combine", traffic.combine, rate.combine),
    ):
        between = traffic.node_hop(row) or traffic.local_hop(row)
        hop = Part(name, between * job.tokens, speed, f"{rate.source}: EP {rate.devices}", "bytes")
        inside = Part(
            f"{name} within nodes",
            traffic.local_hop(row) * job.tokens,
            hardware.nvlink.value,
            hardware.nvlink.source,
            "bytes",
        )
        # Both hops are under way at once (report 3.2.2): the longer one counts.
        parts.append(max(hop, inside, key=lambda part: part.seconds))
    return parts


def gather_parts(job: Job, backward: bool = False) -> list[Part]:
    """Of one layer: latents of shared rows, over the slowest link between the devices that share
    them.
    """
    gather = gather_of(job.cfg)
    if gather is None:
        return []
    mesh, size = job.cfg.mesh, job.hardware.devices_per_node.value
    inside = mesh.row_shards == mesh.local <= size
    link = job.hardware.nvlink if inside else job.hardware.ib
    moved = gather.backward if backward else gather.forward
    return [Part("latents of rows", moved, link.value, link.source, "bytes")]


def forward_time(job: Job, item: Item) -> Time:
    """Of F."""
    return Time(_total(forward_parts(job, item)), _total(_exchanged(job, item)))


def input_gradient_time(job: Job, item: Item) -> Time:
    """Of b; with whole layers recomputed, their exchange is run again too."""
    exchange = _total(_exchanged(job, item, backward=True))
    if job.cfg.train.remat == "full":
        exchange += _total(_exchanged(job, item))
    return Time(_total(input_gradient_parts(job, item)), exchange)


def weight_gradient_time(job: Job, item: Item) -> Time:
    """Of W, which sends nothing."""
    return Time(_total(weight_gradient_parts(job, item)))


def _exchanged(job: Job, item: Item, backward: bool = False) -> list[Part]:
    parts = exchange_parts(job, backward) if item.exchanges else []
    return parts + (gather_parts(job, backward) if item.attends else [])


def _total(parts: list[Part]) -> float:
    return sum(part.seconds for part in parts)
