"""Devices are data with sources; what-ifs change what they say and nothing else."""

import dataclasses
import math

import pytest

from dsv3_jax.plan.hardware import DEVICES, H100, H800, NAMES, WhatIf, changed, hardware_named
from dsv3_jax.plan.kernel_rates import (
    DEEPEP,
    DEEPEP_LOW_LATENCY,
    DEEPGEMM,
    Figure,
    nearest_gemm,
    nearest_latency,
    nearest_link,
)


@pytest.mark.parametrize("name", DEVICES)
def test_every_figure_is_positive_and_has_a_source(name):
    hardware = hardware_named(name)
    for field in dataclasses.fields(hardware):
        value = getattr(hardware, field.name)
        if isinstance(value, Figure):
            assert value.value > 0, field.name
            assert len(value.source) > 3, field.name
    assert all(rate.source for rate in (*hardware.gemm_fp8, *hardware.exchange))
    assert not any(hardware.fp8.value < rate.flops for rate in hardware.gemm_fp8)


def test_only_h800_has_a_price():
    assert H800.price.value == 2
    assert {name for name in DEVICES if DEVICES[name].price} == {"h800"}


def test_unknown_devices_are_refused_with_what_there_is():
    with pytest.raises(ValueError, match="'a100'; allowed: h800, h100, h200, cpu"):
        hardware_named("a100")
    assert NAMES == ("h800", "h100", "h200", "cpu")


def test_a_measured_size_is_its_own_nearest():
    for rate in DEEPGEMM:
        grouped = rate.groups > 0
        found = nearest_gemm(DEEPGEMM, rate.rows, rate.inner, rate.columns, grouped)
        assert found.flops == rate.flops
    for rate in DEEPEP:
        assert nearest_link(DEEPEP, rate.devices, rate.link) == rate
    for rate in DEEPEP_LOW_LATENCY:
        assert nearest_latency(DEEPEP_LOW_LATENCY, rate.devices) == rate


@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(4096, 7168, 36864), (500, 512, 512), (90, 9000, 8000)]
)
def test_nearest_is_in_octaves(rows, inner, columns):
    def distance(rate):
        sizes = ((rate.rows, rows), (rate.inner, inner), (rate.columns, columns))
        return sum(abs(math.log2(a) - math.log2(b)) for a, b in sizes)

    dense = [rate for rate in DEEPGEMM if not rate.groups]
    found = nearest_gemm(DEEPGEMM, rows, inner, columns, grouped=False)
    assert distance(found) == min(map(distance, dense))


def test_links_take_their_exchange_rates_along_and_leave_the_others():
    twice = changed(H800, WhatIf(ib=100))
    assert twice.ib.value == 100e9
    assert twice.nvlink == H800.nvlink
    for old, new in zip(H800.exchange, twice.exchange, strict=True):
        factor = 2 if old.link == "ib" else 1
        assert (new.dispatch, new.combine) == (factor * old.dispatch, factor * old.combine)
    for old, new in zip(H800.low_latency, twice.low_latency, strict=True):
        assert new.dispatch == old.dispatch / 2
    assert changed(H800, WhatIf()) == H800
    assert H100.exchange[0].dispatch == DEEPEP[0].dispatch * 360 / 160


@pytest.mark.parametrize(
    ("what_if", "line"),
    [
        (WhatIf(comm_sms=132), "--what-if.comm-sms is 132; allowed: 0 to 131 of h800's 132"),
        (WhatIf(comm_sms=-1), "--what-if.comm-sms is -1"),
        (WhatIf(ib=0), "--what-if.ib is 0; allowed: 0.001 to 1,000,000 GB/s"),
        (WhatIf(nvlink=math.nan), "--what-if.nvlink is nan"),
    ],
)
def test_hardware_that_cannot_be_is_refused(what_if, line):
    with pytest.raises(ValueError, match=line):
        changed(H800, what_if)
