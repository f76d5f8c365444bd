"""Serving: published bytes and latency bounds; throughput computed again."""

import math
from dataclasses import replace

import pytest

from dsv3_jax.config.presets import dsv3_671b, moe_16b, tiny
from dsv3_jax.plan.hardware import H100, H800, WhatIf, changed
from dsv3_jax.plan.kernel_rates import Figure
from dsv3_jax.plan.serving import (
    LatencyBound,
    Serving,
    ServingLayout,
    cache_bytes,
    cache_bytes_per_layer,
)
from dsv3_jax.plan.serving_lines import serving_lines

V3 = Serving(dsv3_671b(), H800, ServingLayout(), H800.price)
NUMBERS = {
    "prefill_devices": (1, 2**20),
    "decode_devices": (1, 2**20),
    "redundant_experts": (0, 2**31 - 1),
    "prompt": (2, 2**31 - 1),
    "prefill_tokens": (1, 2**31 - 1),
    "context": (0, 2**31 - 1),
    "batch": (1, 2**31 - 1),
}


def test_cache_of_a_token_of_v3():
    assert cache_bytes(dsv3_671b()) == 70272
    assert cache_bytes_per_layer(dsv3_671b(), fp8=True) == 656
    assert cache_bytes(tiny()) == 8 * (32 + 16) * 2


@pytest.mark.parametrize(
    ("bandwidth", "pair", "per_token", "rate"),
    [(50e9, 120.96e-6, 14.76e-3, 67), (900e9, 6.72e-6, 0.82e-3, 1200)],
)
def test_the_latency_bounds_that_are_published(bandwidth, pair, per_token, rate):
    bound = LatencyBound(width=7000, destinations=9, bandwidth=bandwidth, layers=61)
    assert bound.pair == pytest.approx(pair, rel=1e-4)
    assert bound.per_token == pytest.approx(per_token, rel=1e-3)
    assert 1 / bound.per_token == pytest.approx(rate, rel=0.02)
    assert V3.latency_bound.destinations == 9


def test_prefill_is_a_forward_pass_with_the_exchange_hidden():
    tokens, layers = 16384, 58
    exchange = layers * tokens * 4 * (7392 / 44e9 + 14336 / 47e9)
    assert V3.prefill.exchange == pytest.approx(exchange)
    # At 100 to 70% of the fastest measured product, in FLOPs of the main model without its head.
    flops = tokens * (83.48e9 - 2 * 129280 * 7168)
    assert flops / 1300e12 < V3.prefill.compute < flops / 900e12
    assert V3.prefill_seconds == pytest.approx(max(V3.prefill.compute * 132 / 112, exchange))
    assert V3.prefilled == tokens / V3.prefill_seconds


def test_decoding_reads_weights_and_cache_and_waits_for_the_exchange():
    attention = 61 * 187_107_328 - 61 * (1536 + 512)
    dense, expert = 3 * 396_361_728, 44_040_192
    high = 58 * 256 * 7168 + 129280 * 7168  # gate and head, BF16
    experts = 58 * 3 * expert  # two routed of 288 on 144 devices, one shared
    assert V3.experts_per_device == 2
    assert V3.read_weights == attention + dense + experts + 2 * high
    assert V3.decode_exchange == pytest.approx(58 * (192 + 369) * 1e-6)
    scores = 128 * 4989 * 61 * 2 * 128 * (576 + 512)
    assert V3.decode_attention == pytest.approx(scores / 580e12)
    assert V3.decode_products >= V3.read_weights / 3000e9 - 1e-9
    assert V3.per_token == max(V3.decode_products + V3.decode_attention, V3.decode_exchange)
    assert V3.decoded == 128 / V3.per_token


def test_money_of_a_million_tokens():
    assert V3.dollars_per_million(1000) == pytest.approx(2 / 3600 * 1000)
    assert replace(V3, price=None).dollars_per_million(1) is None
    assert not any("money" in line.label for line in serving_lines(replace(V3, price=None)))
    lines = {(line.section, line.label): line.value for line in serving_lines(V3)}
    for section, label in (
        ("prefill", "money per 1M input tokens"),
        ("decode", "money per 1M output tokens"),
    ):
        node = lines[section, "tokens/s of a node"]
        assert lines[section, label] == pytest.approx(1e6 / node * 8 * 2 / 3600)


def test_v3_on_h800_stands_beside_what_was_published_of_tokens_that_are_computed():
    lines = {(line.section, line.label): line.value for line in serving_lines(V3)}
    labels = [label for section, label in lines if section == "prefill" and "publish" in label]
    computed, ratio, hits = (lines["prefill", label] for label in labels)
    assert (round(computed), hits) == (32_207, 73.7e3)
    assert ratio == pytest.approx(lines["prefill", "tokens/s of a node"] / computed)
    assert lines["decode", "published, a node"] == 14.8e3
    ratio = lines["decode", "predicted / published"]
    assert ratio == pytest.approx(lines["decode", "tokens/s of a node"] / 14.8e3)


@pytest.mark.parametrize(
    ("serving", "published"),
    [
        (replace(V3, hardware=H100), False),
        (Serving(moe_16b(), H800, ServingLayout(), H800.price), False),
        (replace(V3, hardware=changed(H800, WhatIf(ib=100))), True),
        (replace(V3, layout=ServingLayout(batch=64)), True),
        (replace(V3, overlap=False), True),
    ],
    ids=["h100", "moe_16b", "what-if", "batch", "no overlap"],
)
def test_published_figures_stand_beside_their_own_model_and_ratios_beside_their_own_layout(
    serving, published
):
    labels = [line.label for line in serving_lines(serving)]
    assert any("published, " in label for label in labels) == published
    assert "predicted / published" not in labels


def test_overlap_links_and_casts_move_it_the_right_way():
    slow = replace(V3, overlap=False)
    assert slow.prefilled < V3.prefilled
    assert slow.per_token == slow.decode_products + slow.decode_attention + slow.decode_exchange
    fast = replace(V3, hardware=changed(H800, WhatIf(ib=100)))
    assert fast.prefilled > V3.prefilled
    assert fast.decode_exchange == pytest.approx(V3.decode_exchange / 2)
    assert replace(V3, fused_cast=True).prefill.compute < V3.prefill.compute
    assert replace(V3, price=Figure(4, "")).dollars_per_million(1) == 2 * V3.dollars_per_million(1)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_unit_of_one_device_exchanges_nothing_and_computes_on_all_sms(overlap):
    layout = ServingLayout(prefill_devices=1, decode_devices=1, redundant_experts=0)
    alone = Serving(moe_16b(), H100, layout, None, overlap)
    assert (alone.prefill.exchange, alone.decode_exchange, alone.slower) == (0, 0, 1)
    assert alone.prefill_seconds == alone.prefill.compute
    assert alone.per_token == alone.decode_products + alone.decode_attention
    lines = serving_lines(alone)
    assert not any(line.label == "exchange" or "this model" in line.label for line in lines)
    (prefill,) = (line for line in lines if line.label == "micro-batch")
    assert prefill.formula == "computation"


def test_overlap_of_prefill_is_given_up_where_it_costs_more_than_it_saves():
    greedy = replace(V3, hardware=changed(H800, WhatIf(comm_sms=131)))
    assert greedy.gives_up
    assert not V3.gives_up
    assert greedy.prefill_seconds == replace(V3, overlap=False).prefill_seconds
    (line,) = (line for line in serving_lines(greedy) if line.label == "micro-batch")
    assert "overlap given up" in line.formula


def test_an_fp8_cache_makes_room_for_more():
    crowded = ServingLayout(batch=200)
    with pytest.raises(ValueError, match=r"GB more than h800 has; allowed: at most 159 sequences"):
        replace(V3, layout=crowded)
    assert replace(V3, layout=replace(crowded, fp8_cache=True)).cache_token == 61 * 656
    assert replace(V3, layout=replace(V3.layout, batch=159))


def test_weights_that_alone_exceed_a_device_are_named_with_what_has_room():
    one = replace(V3.layout, batch=1)
    with pytest.raises(
        ValueError, match=r"devices is 8: weights of .* exceed h800's 80 GB"
    ) as told:
        replace(V3, layout=replace(one, decode_devices=8))
    least = int(str(told.value).rpartition("at least ")[2])
    assert replace(V3, layout=replace(one, decode_devices=least))
    with pytest.raises(ValueError, match=f"devices is {least - 1}: weights"):
        replace(V3, layout=replace(one, decode_devices=least - 1))
    small = replace(H800, memory=Figure(1e9, ""))
    with pytest.raises(ValueError, match="allowed: devices with more memory"):
        replace(V3, hardware=small)


@pytest.mark.parametrize("devices", [12, 48, 512, 3])
def test_units_that_experts_do_not_divide_into_are_refused(devices):
    layout = ServingLayout(prefill_devices=devices)
    with pytest.raises(ValueError, match=f"--serving.prefill-devices is {devices}; allowed"):
        Serving(dsv3_671b(), H100, layout, None)


@pytest.mark.parametrize("value", [-1, 2**31, 10**400])
@pytest.mark.parametrize("name", NUMBERS)
def test_layouts_of_nothing_and_beyond_all_measure_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^--serving.{name.replace('_', '-')} is ") as told:
        ServingLayout(**{name: value})
    least, most = NUMBERS[name]
    assert str(told.value).endswith(f"; allowed: {least} to {most:,}")
    assert len(str(told.value)) < 120
    assert ServingLayout(**{name: least})
    with pytest.raises(ValueError, match=f"is {least - 1}; allowed"):
        ServingLayout(**{name: least - 1})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("end", [0, 1])
def test_layouts_within_bounds_are_planned_or_refused_by_their_own_options(name, end):
    told = refusal_of(ServingLayout(**{"batch": 1, name: NUMBERS[name][end]}))
    assert told is None or told.startswith("--serving.")


def refusal_of(layout: ServingLayout) -> str | None:
    """By Serving; without one the plan has nothing but finite numbers."""
    try:
        serving = replace(V3, layout=layout)
    except ValueError as error:
        return str(error)
    assert all(math.isfinite(line.value) for line in serving_lines(serving))
    return None
