"""A prediction line by line: what is multiplied with what, and where each number is from."""

from collections.abc import Iterator
from dataclasses import dataclass

from dsv3_jax.plan.bubbles import FORMULAS
from dsv3_jax.plan.layer_time import (
    Part,
    exchange_parts,
    forward_parts,
    forward_time,
    input_gradient_parts,
    input_gradient_time,
    product_part,
    weight_gradient_parts,
    weight_gradient_time,
)
from dsv3_jax.plan.prediction import REPORT_MFU, Prediction
from dsv3_jax.plan.products import Item, items_of
from dsv3_jax.plan.promotion import (
    BITS,
    INTERVAL,
    Promotion,
    bits_without,
    longest_sum,
    most_of,
)
from dsv3_jax.plan.terms import terms_of
from dsv3_jax.plan.traffic import Exchange, exchange_of, gather_of, message_bytes

COUNTED = "2 FLOPs a multiplication, backward twice forward; recomputation is not counted"
OURS = "this plan"
OUTCOME = "what it comes to"
NOT_HERE = "what is not counted, and rates that are not reached"
ERRORS = "errors: experiments/accumulation_precision"


@dataclass(frozen=True)
class Line:
    """One figure. `value` in `unit`, not rounded."""

    section: str
    label: str
    formula: str
    """In words and numbers"""
    value: float
    unit: str
    source: str = OURS


def derivation(prediction: Prediction) -> list[Line]:
    """From FLOPs of a token to money, in the order in which they follow from one another."""
    return [
        *_work(prediction),
        *_traffic(prediction),
        *_items(prediction),
        *_step(prediction),
        *_outcome(prediction),
        *_hours(prediction),
        *_links(prediction),
        *_promotion(prediction),
    ]


def _work(p: Prediction) -> Iterator[Line]:
    section, rows = "work of a token", f"rows of {p.cfg.data.length:,} tokens"
    for causal, counting in ((True, "causal"), (False, "full attention")):
        for mtp in (False, True)[: 1 + bool(p.cfg.model.mtp_depth)]:
            label = f"FLOPs, {counting}{', with MTP' * mtp}"
            flops = p.flops_per_token(causal, mtp)
            yield Line(section, label, f"products and scores, {rows}", flops / 1e9, "GF", COUNTED)


def _traffic(p: Prediction) -> Iterator[Line]:
    section, cfg, tokens = "bytes", p.cfg, p.stepper.job.tokens
    if traffic := exchange_of(cfg):
        for name, row in _rows(traffic):
            yield Line(section, f"{name}: a token", f"d = {cfg.model.d_model:,}", row, "B")
            node, local = traffic.node_hop(row), traffic.local_hop(row)
            nodes = f"{traffic.nodes} nodes at most × {row:,}" if node else "one node"
            copies = f"{traffic.copies} copies at most × {row:,}" if local else "one device a node"
            yield Line(section, f"{name}: between nodes", nodes, node, "B")
            yield Line(section, f"{name}: within nodes", copies, local, "B")
        a_token = sum(traffic.node_hop(row) + traffic.local_hop(row) for _, row in _rows(traffic))
        layers = cfg.model.num_moe_layers + cfg.model.mtp_depth
        a_step = a_token * layers * p.tokens_per_step / cfg.mesh.token_shards / cfg.mesh.pipe
        shares = f"{a_token:,} × {layers} layers × tokens of a step / {cfg.mesh.size:,} devices"
        yield Line(section, "exchange, a device and step", shares, a_step / 1e9, "GB")
    if gather := gather_of(cfg):
        width, shards = cfg.model.kv_latent + cfg.model.rope_dim, cfg.mesh.row_shards
        formula = f"{width} numbers a token of {shards - 1} other devices, a micro-batch"
        for name, size in (("forward", gather.forward), ("backward", gather.backward)):
            yield Line(section, f"latents of a layer, {name}", formula, size / 1e6, "MB")
    if cfg.mesh.pipe > 1:
        size = message_bytes(cfg)
        yield Line(section, "pipeline message", f"{tokens:,} tokens × 2 d", size / 1e6, "MB")
    zero = p.stepper.zero
    for name, size, formula in (
        ("ZeRO-1 scatter", zero.scatter, "FP32 gradients that others own"),
        ("ZeRO-1 gather", zero.gather, "weights that others own"),
        ("swap of copies", zero.swap, "DualPipe: gradients there, weights back"),
    ):
        if size:
            yield Line(section, f"{name}, a device and step", formula, size / 1e9, "GB")


def _rows(traffic: Exchange) -> list[tuple[str, int]]:
    return [
        ("dispatch", traffic.dispatch),
        ("combine", traffic.combine),
        ("dispatch of gradients", traffic.gradient_dispatch),
        ("combine of gradients", traffic.combine),
    ]


def _items(p: Prediction) -> Iterator[Line]:
    """Of each kind of item every term of F, and the sums of F, b and W."""
    job = p.stepper.job
    for item in dict.fromkeys(items_of(p.cfg.model)):
        section = f"{item.name}, a micro-batch of {job.tokens:,} tokens"
        for part in forward_parts(job, item):
            yield _term(section, f"F: {part.name}", part)
        if item.exchanges:
            for part in exchange_parts(job):
                yield _term(section, f"F: {part.name}", part)
        yield from _other_terms(p, section, item)
        for letter, time, terms in (
            ("F", forward_time(job, item), ""),
            ("b", input_gradient_time(job, item), ", with F's products as Dgrad"),
            ("W", weight_gradient_time(job, item), ", with F's products as Wgrad"),
        ):
            formula = f"{time.compute * 1e3:.4g} computation{terms}"
            if time.exchange:
                formula += f" + {time.exchange * 1e3:.4g} exchange"
            yield Line(section, letter, formula, time.alone * 1e3, "ms")


def _other_terms(p: Prediction, section: str, item: Item) -> Iterator[Line]:
    """Of b and W, those that F has not."""
    job = p.stepper.job
    same = forward_parts(job, item)
    for letter, parts in (
        ("b", input_gradient_parts(job, item)),
        ("W", weight_gradient_parts(job, item)),
    ):
        for part in parts:
            if part not in same:
                yield _term(section, f"{letter}: {part.name}", part)
    if item.exchanges:
        for part in exchange_parts(job, backward=True):
            yield _term(section, f"b: {part.name}", part)


def _term(section: str, label: str, part: Part) -> Line:
    big = part.rate >= 1e12
    scale, unit = (1e12, "T") if big else (1e9, "G")
    word = unit + ("FLOPs" if part.unit == "FLOPs" else "B")
    formula = f"{part.work / scale:.4g} {word} / {part.rate / scale:.4g} {word}/s"
    return Line(section, label, formula, part.seconds * 1e3, "ms", part.source)


def _step(p: Prediction) -> Iterator[Line]:
    section, step, timeline = "a step at the full batch", p.step, p.step.timeline
    ranks, schedule = timeline.schedule.ranks, timeline.schedule
    busy = sum(timeline.busy) / ranks
    if schedule.chunks == 2:
        yield _pair(p, section)
    a_rank = f"{schedule.microbatches} micro-batches, mean of {ranks} rank{'s' * (ranks > 1)}"
    yield Line(section, "operations", a_rank, busy, "s", "stages' times")
    idle = timeline.makespan - busy
    how = "mean over ranks" if ranks > 1 else "one rank"
    yield Line(section, "bubble", how, idle, "s", f"simulated {step.schedule}")
    if ranks > 1:
        yield from _bubble(p, section)
    yield Line(section, "pipeline", "operations + bubble", timeline.makespan, "s")
    yield Line(section, "ZeRO-1", "scatter + gather + swap over the slowest link", step.sync, "s")
    yield Line(
        section, "update", "masters, moments, gradients and weights in memory", step.update, "s"
    )
    yield Line(section, "step", "pipeline + ZeRO-1 + update", step.seconds, "s")


def _pair(p: Prediction, section: str) -> Line:
    """The stage whose pair lasts longest, and whether its exchange is hidden at all."""
    overlap = p.stepper.overlap
    times = {stage: stage.forward + stage.backward for stage in p.stepper.stages}
    how = "F + B"
    if overlap.on:
        how = f"max(computation × {overlap.slower:.4g}, exchange), or F + B if that is less"
        given_up = sum(map(overlap.gives_up, times.values()))
        if given_up:
            how = (
                f"F + B: overlap given up on {given_up} of {len(times)} stages, where computation "
                f"× {overlap.slower:.4g} beside it takes longer"
            )
    stage = max(times, key=lambda stage: overlap.pair(times[stage]))
    pair = overlap.pair(times[stage]) * 1e3
    return Line(section, f"pair FB, stage {stage.cut}", how, pair, "ms")


def _bubble(p: Prediction, section: str) -> Iterator[Line]:
    """Where it is, and how much of it even stages would have (Table 2)."""
    timeline, stages, overlap = p.step.timeline, p.stepper.stages, p.stepper.overlap
    idle, formula = timeline.idle, FORMULAS[p.step.schedule]
    for word, of in (("most", max), ("least", min)):
        rank = of(range(len(idle)), key=idle.__getitem__)
        parts = [timeline.schedule.stage(rank, c) for c in range(timeline.schedule.chunks)]
        held = ", ".join(f"stage {part} ({stages[part].cut})" for part in parts)
        yield Line(section, f"rank that idles {word}", f"rank {rank}: {held}", idle[rank], "s")
    whole = [(stage.forward + stage.backward).alone * 1e3 for stage in stages]
    number = max(range(len(whole)), key=whole.__getitem__)
    how = f"stage {number}, {stages[number].cut}: F + B; mean {sum(whole) / len(whole):,.6g} ms"
    yield Line(section, "slowest stage", how, whole[number], "ms")
    even = (
        sum(stage.forward.alone for stage in stages),
        sum(stage.backward.alone for stage in stages),
        sum(stage.weights.alone for stage in stages),
        sum(overlap.pair(stage.forward + stage.backward) for stage in stages),
    )
    bubble = formula.bubble(len(idle), *(time / len(stages) for time in even))
    exact = f"; exact for {formula.holds}" * bool(formula.holds)
    how = f"{formula.text}, of the stages' mean times{exact}"
    yield Line(section, "bubble if stages were even", how, bubble, "s", "report, Table 2")


def _outcome(p: Prediction) -> Iterator[Line]:
    section = OUTCOME
    devices = f"{p.cfg.mesh.size:,} devices"
    tokens = f"{p.tokens_per_step:,} tokens / step / {devices}"
    yield Line(section, "tokens/s of a device", tokens, p.tokens_per_second, "1/s")
    peak = f"{p.hardware.bf16.value / 1e12:,.5g} TFLOPS BF16"
    for causal, counting in ((True, "causal"), (False, "full attention")):
        for mtp in (False, True)[: 1 + bool(p.cfg.model.mtp_depth)]:
            label = f"MFU, {counting}{', with MTP' * mtp}"
            mfu = 100 * p.mfu(causal, mtp)
            formula = f"FLOPs × tokens/s / {peak}"
            yield Line(section, label, formula, mfu, "%", p.hardware.bf16.source)
    hours = p.hours_per_trillion
    yield Line(section, "device-hours per 1T tokens", "10^12 / tokens/s / 3600", hours, "h")
    yield from _priced(p, section, "per 1T tokens", hours)
    if p.reported:
        reported = p.reported
        yield Line(section, "the report's", "published", reported.value, "h", reported.source)
        if p.plain:
            factor = reported.value / hours
            yield Line(
                section,
                "fitted factor",
                "published / predicted",
                factor,
                "×",
                "fitted, not derived",
            )
    sizes = f"{sum(count for _, count in p.run):,} steps, ramp included"
    yield Line(section, "tokens of the run", sizes, p.run_tokens, "")
    yield Line(section, "device-hours of the run", f"Σ step × {devices}", p.run_hours, "h")
    yield from _priced(p, section, "of the run", p.run_hours)
    days = p.run_hours / p.cfg.mesh.size / 24
    yield Line(section, "days of the run", f"device-hours / {devices} / 24", days, "d")


def _hours(p: Prediction) -> Iterator[Line]:
    """What device-hours go to, largest first, and what the published ones have beyond them."""
    section, seconds = "where the hours of 1T tokens go", p.step.seconds
    for name, spent in terms_of(p).items():
        formula = f"{spent:.4g} s of the step's {seconds:.4g}, mean of ranks"
        yield Line(
            section, f"spent on {name}", formula, p.hours_per_trillion * spent / seconds, "h"
        )
    if p.reported and p.plain:
        rest = p.reported.value - p.hours_per_trillion
        yield Line(section, "published beyond these", "published - predicted", rest, "h", NOT_HERE)
        source, mfu = REPORT_MFU.source, 100 * REPORT_MFU.value
        yield Line(section, "MFU, published", "causal, without MTP", mfu, "%", source)
        mfu = 100 * p.mfu(causal=True, mtp=False)
        yield Line(section, "MFU, predicted", "causal, without MTP", mfu, "%")


def _priced(p: Prediction, section: str, label: str, hours: float) -> Iterator[Line]:
    dollars = p.dollars(hours)
    if dollars is not None:
        each = f"device-hours × ${p.price.value:g}"
        yield Line(section, f"money {label}", each, dollars, "USD", p.price.source)


def _links(p: Prediction) -> Iterator[Line]:
    """The report's hardware section: 1:1 without overlap, 3.2 experts a node (3.2.1, 3.2.2)."""
    section, hardware, traffic = "communication", p.hardware, exchange_of(p.cfg)
    if not traffic:
        return
    time = p.all_stages
    yield Line(
        section,
        "computation : exchange, no overlap",
        f"{time.compute * 1e3:.4g} ms : {time.exchange * 1e3:.4g} ms, all stages, F and B",
        time.compute / time.exchange,
        ": 1",
        "the report: about 1 : 1 (3.2.1)",
    )
    if traffic.nodes > 1:
        free = hardware.nvlink.value / hardware.ib.value
        links = f"{hardware.nvlink.value / 1e9:g} / {hardware.ib.value / 1e9:g} GB/s"
        yield Line(section, "experts a node for free", links, free, "", "the report: 3.2 (3.2.2)")
        nodes = f"{traffic.nodes} nodes × {free:.4g}"
        total = traffic.nodes * free
        yield Line(
            section, "experts a token, same cost", nodes, total, "", "the report: 13 (3.2.2)"
        )


def _promotion(p: Prediction) -> Iterator[Line]:
    """Bounds of what other sums in FP8 would save (3.3.2, 3.5.2)."""
    if not p.unhidden:
        return
    section, promotion = "FP8 sums, what if", p.unhidden.job.promotion
    formula = f"{INTERVAL} × 2^({promotion.bits} − {BITS}): as much error as {BITS} bits in 128"
    label = f"a sum without promotion, {promotion.bits} bits"
    yield Line(section, label, formula, promotion.allowed, "products", ERRORS)
    if promotion.asked:
        yield Line(section, "between promotions", "asked for", promotion.asked, "products")
    name, longest = longest_sum(p.cfg)
    formula = f"{BITS} + log2({longest:,} / {INTERVAL}): {name}"
    bits = bits_without(longest)
    yield Line(section, "bits that promote no sum", formula, bits, "bits", ERRORS)
    if promotion.group:
        label, hint = "between scales", "CUDA cores multiply them all the same"
        formula = f"{hint}: --what-if.group-scales takes that from them"
        yield Line(section, label, formula, promotion.group, "products", "report 3.5.2")
    yield from _fmas(p, section, promotion)
    fastest = (
        ("hidden", "as above: two warpgroups take turns", p.step.seconds, "report 3.3.2"),
        ("not hidden", "products without the FMAs saved", p.unhidden_seconds, OURS),
    )
    for word, formula, seconds, source in fastest:
        yield Line(section, f"step, promotion {word}", formula, seconds, "s", source)
    for word, _, seconds, _ in fastest:
        hours = p.hours_per_trillion * seconds / p.step.seconds
        label = f"device-hours per 1T tokens, {word}"
        yield Line(section, label, "step × devices / tokens", hours, "h")


def _fmas(p: Prediction, section: str, promotion: Promotion) -> Iterator[Line]:
    """Their share of products' time, as measured and as asked for, if nothing hides them."""
    fp32, most = promotion.fp32, most_of(p.cfg)
    now = product_part(p.stepper.job, most)
    peak = p.hardware.fp8.value
    rates = [("an FP8 product at its peak", peak)]
    if now.unit == "FLOPs":
        rates.append((f"{most.name}, as measured", now.rate))
    for name, rate in rates:
        formula = f"{rate / 1e12:,.5g} T / ({INTERVAL} × {fp32.value / 1e12:g} T) of FP32"
        part = 100 * rate / (INTERVAL * fp32.value)
        yield Line(section, f"FMAs beside {name}", formula, part, "%", fp32.source)
    before, after = -(-most.inner // INTERVAL), promotion.operations(most.inner)
    formula = f"an output of {most.name}: {before} as it is, {after} asked for"
    yield Line(section, "FMAs that are saved", formula, before - after, "")
