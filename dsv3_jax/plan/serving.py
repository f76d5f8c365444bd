"""What serving a model comes to: cache, tokens/s, money per million tokens (report 3.4).

Units of prefill and of decoding as DeepSeek runs them: attention by data parallelism, experts over
all devices of the unit, two micro-batches in turn, so that the exchange of one hides behind the
computation of the other. FP8 linears and dispatch, BF16 attention and combine.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

from dsv3_jax.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    QuantConfig,
    RunConfig,
    TrainConfig,
)
from dsv3_jax.config.fields import check, shown
from dsv3_jax.config.mesh import MAX_DEVICES
from dsv3_jax.config.presets import dsv3_671b
from dsv3_jax.plan.hardware import H800, Hardware
from dsv3_jax.plan.kernel_rates import Figure, nearest_gemm, nearest_latency
from dsv3_jax.plan.layer_time import Job, Time, forward_time
from dsv3_jax.plan.products import Product, items_of

LARGEST_SIZE = 2**31 - 1  # model.max_length's own bound; products of such are finite floats
MEASURED_TOKENS = 128  # a device, of the exchange's latencies
PUBLISHED_DAY = "open-infra-index, 24 hours to 2025-02-28"
CACHE_HITS = 0.563  # share of input tokens that day
PREFILLED = Figure(73.7e3, f"{PUBLISHED_DAY}, {CACHE_HITS:.1%} of them cache hits")
DECODED = Figure(14.8e3, PUBLISHED_DAY)


@dataclass(frozen=True)
class ServingLayout:
    """Units of devices, and what they serve. Defaults are DeepSeek's published ones."""

    prefill_devices: int = 32
    """Of a unit: 4 nodes"""
    decode_devices: int = 144
    """Of a unit: 18 nodes"""
    redundant_experts: int = 32
    """Copies of busy experts, in every layer and unit"""
    prompt: int = 4096
    """Tokens of a prompt"""
    prefill_tokens: int = 16384
    """Of one device and micro-batch"""
    context: int = 4989
    """Cached tokens of a sequence that is decoded, on average"""
    batch: int = 128
    """Sequences that a device decodes"""
    fp8_cache: bool = False
    """Latents in E4M3 with an FP32 scale for each 128, rotary keys in BF16"""

    def __post_init__(self) -> None:
        for name, (least, most) in _BOUNDS.items():
            value, option = getattr(self, name), f"--serving.{name.replace('_', '-')}"
            check(option, shown(value), least <= value <= most, f"{least} to {most:,}")


_BOUNDS = {
    "prefill_devices": (1, MAX_DEVICES),
    "decode_devices": (1, MAX_DEVICES),
    "redundant_experts": (0, LARGEST_SIZE),
    "prompt": (2, LARGEST_SIZE),  # a row of the run that prefill is planned as
    "prefill_tokens": (1, LARGEST_SIZE),
    "context": (0, LARGEST_SIZE),
    "batch": (1, LARGEST_SIZE),
}


def cache_bytes_per_layer(model: ModelConfig, fp8: bool = False) -> int:
    """Of a token: latent and shared rotary key. For V3 1,152 in BF16, 656 in FP8."""
    if not fp8:
        return 2 * (model.kv_latent + model.rope_dim)
    return model.kv_latent + 4 * -(-model.kv_latent // 128) + 2 * model.rope_dim


def cache_bytes(model: ModelConfig, fp8: bool = False) -> int:
    """Of a token in all layers: 70,272 for V3 in BF16."""
    return model.num_layers * cache_bytes_per_layer(model, fp8)


@dataclass(frozen=True)
class LatencyBound:
    """What the exchange alone allows while decoding (arXiv 2505.09343, 2.3.2): a dispatch in FP8
    and a combine in BF16 of each token to every one of its experts, in two micro-batches.
    """

    width: int
    """Numbers of a token"""
    destinations: int
    """Routed and shared experts of a token: 9"""
    bandwidth: float
    """Bytes/s of a device's link"""
    layers: int
    tokens: int = 32
    """Of a device and micro-batch"""

    @property
    def pair(self) -> float:
        """Seconds of a dispatch and a combine."""
        return (1 + 2) * self.tokens * self.destinations * self.width / self.bandwidth

    @property
    def per_token(self) -> float:
        """Seconds of a token of every sequence (TPOT): two pairs a layer."""
        return 2 * self.pair * self.layers


@dataclass(frozen=True)
class Serving:
    """A layout on a kind of device. Times in seconds."""

    model: ModelConfig
    hardware: Hardware
    layout: ServingLayout
    price: Figure | None
    overlap: bool = True
    """Whether the exchange of one micro-batch hides behind the computation of the other"""
    fused_cast: bool = False

    def __post_init__(self) -> None:
        if not self.hardware.low_latency:
            raise ValueError(
                f"--serve with --hardware {self.hardware.name}: no rates of an exchange while "
                "decoding; allowed: h800, h100, h200"
            )
        self._check_unit()
        self._check_memory()

    def _check_unit(self) -> None:
        devices, a_node = self.layout.prefill_devices, int(self.hardware.devices_per_node.value)
        nodes, groups = max(1, devices // a_node), self.model.num_groups
        whole_nodes = devices < a_node or devices % a_node == 0
        evenly = self.model.num_experts % devices == 0 and (groups == 1 or groups % nodes == 0)
        if not (whole_nodes and evenly):
            raise ValueError(
                f"--serving.prefill-devices is {devices}; allowed: whole nodes of {a_node}, or "
                f"less than one, that share {self.model.num_experts} experts in {groups} groups "
                "evenly"
            )

    def _check_memory(self) -> None:
        free = self.hardware.memory.value - self.decode_weights
        need = self.layout.batch * self.layout.context * self.cache_token
        if free < 0:
            raise ValueError(
                f"--serving.decode-devices is {self.layout.decode_devices}: weights of "
                f"{self.decode_weights / 1e9:.1f} GB a device alone exceed {self.hardware.name}'s "
                f"{self.hardware.memory.value / 1e9:g} GB; allowed: {self._enough_devices}"
            )
        if need > free:
            fit = max(0, int(free / (self.cache_token * self.layout.context or 1)))
            raise ValueError(
                f"--serving.batch {self.layout.batch} of {self.layout.context:,} tokens needs "
                f"{need / 1e9:.1f} GB of cache beside {self.decode_weights / 1e9:.1f} GB of "
                f"weights, {(need - free) / 1e9:.1f} GB more than {self.hardware.name} has; "
                f"allowed: {f'at most {fit} sequences' if fit else 'a shorter --serving.context'}, "
                "or more --serving.decode-devices"
            )

    @property
    def _enough_devices(self) -> str:
        """Of a unit for the weights to find room: only routed experts are shared out."""
        routed = sum(self._resident(p) for p in self._decoded_products if p.routed)
        room = self.hardware.memory.value - (self.decode_weights - routed)
        if room <= 0:
            return "devices with more memory: what is not shared out alone exceeds it"
        return f"at least {math.ceil(routed * self.layout.decode_devices / room)}"

    @property
    def published(self) -> bool:
        """Whether DeepSeek's figures are of this model and hardware."""
        return self.model == dsv3_671b() and self.hardware.name == H800.name

    @property
    def plain(self) -> bool:
        """Whether they are of this layout too, and nothing is asked what if."""
        same = self.layout == ServingLayout() and self.hardware == H800
        return self.published and same and self.overlap and not self.fused_cast

    @property
    def cache_token(self) -> int:
        """Bytes."""
        return cache_bytes(self.model, self.layout.fp8_cache)

    # --- prefill ---

    @cached_property
    def prefill(self) -> Time:
        """Of a device's micro-batch, without the head, which only a prompt's last token meets."""
        layers = items_of(self.model)[: 1 + self.model.num_layers]
        return sum((forward_time(self.prefill_job, item) for item in layers), Time())

    @property
    def slower(self) -> float:
        """Factor on computation beside which communication holds SMs, if there is any."""
        return self.hardware.slower if self.overlap and self.prefill.exchange else 1.0

    @property
    def prefill_seconds(self) -> float:
        """Of a device's micro-batch."""
        if self.gives_up:
            return self.prefill.alone
        return self._beside(self.prefill.compute * self.slower, self.prefill.exchange)

    @property
    def gives_up(self) -> bool:
        """Whether hiding the exchange of prefill would cost more than it saves."""
        return self.overlap and self.prefill.compute * self.slower > self.prefill.alone

    @property
    def prefilled(self) -> float:
        """Prompt tokens/s of a device."""
        return self.prefill_job.tokens / self.prefill_seconds

    @cached_property
    def prefill_job(self) -> Job:
        """A unit's forward pass as that of a run."""
        layout, a_node = self.layout, int(self.hardware.devices_per_node.value)
        mesh = MeshConfig(
            node=max(1, layout.prefill_devices // a_node),
            local=min(a_node, layout.prefill_devices),
        )
        rows = max(1, layout.prefill_tokens // layout.prompt)
        cfg = RunConfig(
            model=replace(self.model, max_length=max(self.model.max_length, layout.prompt)),
            data=DataConfig(length=layout.prompt),
            train=TrainConfig(rows=rows * mesh.token_shards),
            quant=QuantConfig("fp8"),
            mesh=mesh,
        )
        return Job(cfg, self.hardware, self.fused_cast)

    def _beside(self, computation: float, exchange: float) -> float:
        return max(computation, exchange) if self.overlap else computation + exchange

    # --- decode ---

    @property
    def experts_per_device(self) -> float:
        """Routed ones, copies among them."""
        total = self.model.num_experts + self.layout.redundant_experts
        return total / self.layout.decode_devices

    def _resident(self, product: Product) -> float:
        """Bytes of a product's weights on a device that decodes: FP8, or BF16 where it is not."""
        held = self.experts_per_device if product.routed else 1
        return held * product.inner * product.columns * (1 if product.low else 2)

    @property
    def _decoded_products(self) -> list[Product]:
        items = items_of(self.model)[: 2 + self.model.num_layers]
        return [product for item in items for product in item.products]

    @property
    def read_weights(self) -> float:
        """Bytes that every step reads."""
        return sum(map(self._resident, self._decoded_products))

    @property
    def decode_weights(self) -> float:
        """Bytes on a device, the embedding among them."""
        return self.read_weights + 2 * self.model.vocab_size * self.model.d_model

    @property
    def decode_products(self) -> float:
        """Seconds of all products of a step at measured rates, for the device's sequences."""
        seconds = 0.0
        for product in self._decoded_products:
            flops = product.flops * self.layout.batch
            rate = self.hardware.gemm_bf16.value
            if product.low:
                rows = self.layout.batch * product.copies
                rows /= self.experts_per_device if product.routed else 1
                rate = nearest_gemm(
                    self.hardware.gemm_fp8,
                    max(1, rows),
                    product.inner,
                    product.columns,
                    product.routed,
                ).flops
            seconds += max(flops / rate, self._resident(product) / self.hardware.streamed.value)
        return seconds

    @property
    def decode_attention(self) -> float:
        """Seconds of absorbed attention over the cache: computation or reading, the longer."""
        m, layout = self.model, self.layout
        pairs = layout.batch * layout.context * m.num_layers
        flops = 2 * m.num_heads * (2 * m.kv_latent + m.rope_dim) * pairs
        read = layout.batch * layout.context * self.cache_token
        return max(flops / self.hardware.attention.value, read / self.hardware.streamed.value)

    @property
    def decode_exchanges(self) -> bool:
        """Not where a unit of one device has all experts, nor in a model without any."""
        return self.layout.decode_devices > 1 and self.model.num_moe_layers > 0

    @property
    def decode_exchange(self) -> float:
        """Seconds of dispatch and combine in all layers, measured for 128 tokens a device."""
        if not self.decode_exchanges:
            return 0.0
        rate = nearest_latency(self.hardware.low_latency, self.layout.decode_devices)
        share = self.layout.batch / MEASURED_TOKENS
        return (rate.dispatch + rate.combine) * share * self.model.num_moe_layers

    @property
    def per_token(self) -> float:
        """Seconds of one token of every sequence (TPOT), exchange and computation overlapped."""
        return self._beside(self.decode_products + self.decode_attention, self.decode_exchange)

    @property
    def decoded(self) -> float:
        """Tokens/s of a device."""
        return self.layout.batch / self.per_token

    # --- money ---

    def dollars_per_million(self, tokens_per_second: float) -> float | None:
        """Of tokens at so many a second and device; None without a price."""
        if self.price is None:
            return None
        return self.price.value / 3600 / tokens_per_second * 10**6

    @property
    def latency_bound(self) -> LatencyBound:
        """For this model over InfiniBand."""
        m = self.model
        destinations = m.experts_per_token + m.num_shared_experts
        return LatencyBound(m.d_model, destinations, self.hardware.ib.value, m.num_layers)
