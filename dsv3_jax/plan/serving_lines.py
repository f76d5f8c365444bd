"""What serving comes to, line by line; DeepSeek's published figures beside its own model."""

from collections.abc import Iterator
from dataclasses import replace

from dsv3_jax.plan.derivation import OURS, Line
from dsv3_jax.plan.kernel_rates import Figure, nearest_latency
from dsv3_jax.plan.layer_time import exchange_parts
from dsv3_jax.plan.serving import (
    CACHE_HITS,
    DECODED,
    PREFILLED,
    LatencyBound,
    Serving,
    cache_bytes,
    cache_bytes_per_layer,
)

BOUND = "arXiv 2505.09343, 2.3.2, which takes 7,000 for d"
FASTER = 900e9  # bytes/s, of the network that it is compared with


def serving_lines(s: Serving) -> list[Line]:
    """Cache, prefill, decoding, latency bound."""
    return [*_cache(s), *_prefill(s), *_decode(s), *_bound(s)]


def _cache(s: Serving) -> Iterator[Line]:
    section, m = "cache", s.model
    for name, fp8 in (("BF16", False), ("FP8", True)):
        layer = cache_bytes_per_layer(m, fp8)
        widths = f"latent {m.kv_latent} + rotary key {m.rope_dim}"
        yield Line(section, f"a token and layer, {name}", widths, layer, "B")
        total = f"{m.num_layers} layers × {layer:,}"
        yield Line(section, f"a token, {name}", total, cache_bytes(m, fp8), "B")


def _prefill(s: Serving) -> Iterator[Line]:
    section, job = "prefill", s.prefill_job
    devices = s.layout.prefill_devices
    how = f"{devices} device{'s' * (devices > 1)}, {job.tokens:,} tokens each"
    yield Line(section, "computation", how, s.prefill.compute, "s")
    for part in exchange_parts(job)[:1]:
        yield Line(section, "exchange", how, s.prefill.exchange, "s", part.source)
    both = "computation"
    if s.prefill.exchange:
        both = "computation + exchange"
        if s.overlap:
            both = f"max(computation × {s.slower:.4g}, exchange)"
        if s.gives_up:
            both = f"computation + exchange: overlap given up, × {s.slower:.4g} takes longer"
    yield Line(section, "micro-batch", both, s.prefill_seconds, "s")
    yield from _rates(s, section, s.prefilled, f"{job.tokens:,} / micro-batch")
    computed = replace(PREFILLED, value=PREFILLED.value * (1 - CACHE_HITS))
    formula = f"{PREFILLED.value:,.0f} × (1 - {CACHE_HITS}): only these are computed"
    yield from _published(s, section, s.prefilled, computed, "without cache hits", formula)
    if s.published:
        label = "published, a node, with cache hits"
        yield Line(section, label, "measured", PREFILLED.value, "1/s", PREFILLED.source)
    yield from _money(s, section, s.prefilled, "input")


def _decode(s: Serving) -> Iterator[Line]:
    section, layout = "decode", s.layout
    how = f"{layout.batch} sequences a device"
    held = f"{s.experts_per_device:.3g} routed experts a layer and all else"
    yield Line(section, "weights", held, s.decode_weights / 1e9, "GB")
    cached = layout.batch * layout.context * s.cache_token / 1e9
    cache = f"{layout.batch} × {layout.context:,} tokens × {s.cache_token:,} B"
    yield Line(section, "cache", cache, cached, "GB")
    yield Line(section, "products", f"{how}, or weights read", s.decode_products * 1e3, "ms")
    attention = f"{layout.context:,} tokens, or cache read"
    yield Line(
        section,
        "attention",
        attention,
        s.decode_attention * 1e3,
        "ms",
        s.hardware.attention.source,
    )
    both = "sum of these"
    if s.decode_exchanges:
        yield _decode_exchange(s, section)
        both = "max(products + attention, exchange)" if s.overlap else both
    yield Line(section, "a token (TPOT)", both, s.per_token * 1e3, "ms")
    yield Line(section, "tokens/s of a user", "1 / TPOT", 1 / s.per_token, "1/s")
    yield from _rates(s, section, s.decoded, f"{layout.batch} / TPOT")
    yield from _published(s, section, s.decoded, DECODED, "", "measured")
    yield from _money(s, section, s.decoded, "output")


def _decode_exchange(s: Serving, section: str) -> Line:
    wait = nearest_latency(s.hardware.low_latency, s.layout.decode_devices)
    pair = f"{(wait.dispatch + wait.combine) * 1e6:.4g} µs × {s.model.num_moe_layers} layers"
    formula = f"{pair} × {s.layout.batch} / 128"
    where = f"{wait.source}: EP {wait.devices}"
    return Line(section, "exchange", formula, s.decode_exchange * 1e3, "ms", where)


def _rates(s: Serving, section: str, tokens: float, formula: str) -> Iterator[Line]:
    devices = s.hardware.devices_per_node.value
    yield Line(section, "tokens/s of a device", formula, tokens, "1/s")
    yield Line(section, "tokens/s of a node", f"× {devices:.0f}", tokens * devices, "1/s")


def _published(
    s: Serving, section: str, tokens: float, figure: Figure, of: str, formula: str
) -> Iterator[Line]:
    """What was measured of the same model and hardware, and how far the prediction is above it."""
    if not s.published:
        return
    label = f"published, a node{', ' * bool(of)}{of}"
    yield Line(section, label, formula, figure.value, "1/s", figure.source)
    if s.plain:
        factor = tokens * s.hardware.devices_per_node.value / figure.value
        yield Line(section, "predicted / published", "tokens/s of a node / published", factor, "×")


def _money(s: Serving, section: str, tokens: float, kind: str) -> Iterator[Line]:
    dollars = s.dollars_per_million(tokens)
    if dollars is not None:
        formula = f"${s.price.value:g} / 3600 / tokens/s × 10^6"
        label = f"money per 1M {kind} tokens"
        yield Line(section, label, formula, dollars, "USD", s.price.source)


def _bound(s: Serving) -> Iterator[Line]:
    section = "bound by the exchange's latency"
    bounds = [("this model", s.latency_bound, OURS)] * s.decode_exchanges
    if s.published:
        published = LatencyBound(7000, 9, 50e9, 61)
        bounds += [
            ("published, 50 GB/s", published, BOUND),
            ("published, 900 GB/s", replace(published, bandwidth=FASTER), BOUND),
        ]
    for name, bound, source in bounds:
        formula = (
            f"3 B × {bound.tokens} tokens × {bound.destinations} × {bound.width:,} / "
            f"{bound.bandwidth / 1e9:g} GB/s"
        )
        yield Line(section, f"{name}: pair", formula, bound.pair * 1e6, "µs", source)
        tpot = f"2 pairs × {bound.layers} layers"
        yield Line(section, f"{name}: TPOT", tpot, bound.per_token * 1e3, "ms", source)
        rate = 1 / bound.per_token
        yield Line(section, f"{name}: tokens/s", "1 / TPOT", rate, "1/s", source)
