"""What other FP8 sums would save is counted from data-sheet peaks, by hand; the rule by which bits
need promotion is the emulated accumulator's.
"""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from dsv3_jax.config import MeshConfig, PipelineConfig, QuantConfig, RunConfig
from dsv3_jax.config.load import load_config
from dsv3_jax.config.presets import tiny_run
from dsv3_jax.plan.derivation import derivation
from dsv3_jax.plan.hardware import DEVICES, H100, H800, WhatIf
from dsv3_jax.plan.layer_time import Job, product_part
from dsv3_jax.plan.prediction import predict
from dsv3_jax.plan.products import items_of
from dsv3_jax.plan.promotion import bits_without, longest_sum, most_of, promotion_of
from dsv3_jax.quant.accumulator import Accumulator, emulated_matmul
from dsv3_jax.quant.fp8 import fake_quantize
from dsv3_jax.quant.recipes import RECIPES

ROOT = Path(__file__).parents[2]
BITS_16 = WhatIf(accumulator_bits=16)
FREE = WhatIf(accumulator_bits=32, group_scales=True)


@pytest.fixture(scope="module")
def report() -> RunConfig:
    """The report's job, all of it at the full batch."""
    cfg = load_config(ROOT / "configs" / "dsv3_671b.py")
    return replace(cfg, schedule=replace(cfg.schedule, rows_phases=()))


def lines_of(cfg: RunConfig, what_if: WhatIf) -> dict[str, float]:
    found = derivation(predict(cfg, H800, what_if=what_if))
    return {line.label: line.value for line in found}


def test_a_product_without_fmas_is_shorter_by_theirs(report):
    """Experts' gate and up of V3 on 4,096 tokens: 56 FMAs an output at 66.9 TFLOP/s."""
    job, product = Job(report, H800), most_of(report)
    assert (product.name, product.inner, product.columns) == ("experts: gate and up", 7168, 4096)
    outputs, flops = 4096 * 8 * 4096, 2 * 8 * 4096 * 7168 * 4096
    measured = flops / 1297e12
    assert product_part(job, product).seconds == pytest.approx(measured)
    for what_if, fmas in (
        (FREE, 0),
        (WhatIf(accumulator_bits=16, group_scales=True), 14),
        (WhatIf(accumulator_bits=32), 56),
        (WhatIf(group_scales=True), 56),
        (WhatIf(promotion_interval=64), 112),
        (WhatIf(promotion_interval=512, group_scales=True), 14),
    ):
        other = replace(job, promotion=promotion_of(report, H800, what_if))
        saved = 2 * outputs * (56 - fmas) / 66.9e12
        assert product_part(other, product).seconds == pytest.approx(measured - saved)


def test_bounds_stand_in_lines(report):
    plain, told = lines_of(report, WhatIf()), lines_of(report, FREE)
    assert told["FMAs beside an FP8 product at its peak"] == pytest.approx(
        100 * 1978.9 / (128 * 66.9)
    )
    assert told["FMAs beside experts: gate and up, as measured"] == pytest.approx(
        100 * 1297 / (128 * 66.9)
    )
    assert told["FMAs that are saved"] == 56
    hidden, seen = told["step, promotion hidden"], told["step, promotion not hidden"]
    assert hidden == told["step"] == plain["step"]
    assert 0.9 * hidden < seen < hidden
    for word, step in (("hidden", hidden), ("not hidden", seen)):
        hours = 1e12 / (15360 * 4096) * step * 2048 / 3600
        assert told[f"device-hours per 1T tokens, {word}"] == pytest.approx(hours)
    assert not any("promotion" in label for label in plain)
    assert "fitted factor" not in told


def test_scales_of_groups_keep_cuda_cores_busy_whatever_the_bits(report):
    for saves_nothing in (WhatIf(accumulator_bits=32), WhatIf(group_scales=True)):
        told = lines_of(report, saves_nothing)
        assert told["step, promotion not hidden"] == told["step, promotion hidden"]
    assert lines_of(report, WhatIf(accumulator_bits=32))["between scales"] == 128
    assert "between scales" not in lines_of(report, FREE)
    one_scale = replace(report, quant=QuantConfig("fp8_per_tensor"))
    told = lines_of(one_scale, WhatIf(accumulator_bits=32))
    assert told["step, promotion not hidden"] < told["step, promotion hidden"]


def test_groups_are_the_recipes(report):
    for name, recipe in RECIPES.items():
        if name.startswith("fp8"):
            promotion = promotion_of(replace(report, quant=QuantConfig(name)), H800, BITS_16)
            block = recipe["linear"].input.block
            assert promotion.group == (block and block[1])


def test_more_promotions_take_longer_if_they_are_seen(report):
    told = lines_of(report, WhatIf(promotion_interval=64))
    assert told["step, promotion not hidden"] > told["step, promotion hidden"]


@pytest.mark.parametrize("name", DEVICES)
def test_no_product_becomes_faster_than_the_peak(name, report):
    """Else that bound could not be."""
    hardware = DEVICES[name]
    job = Job(report, hardware, promotion=promotion_of(report, hardware, FREE))
    parts = [product_part(job, p) for item in items_of(report.model) for p in item.products]
    assert max(part.rate for part in parts) < hardware.fp8.value


def test_the_longest_sum_is_dgrads_over_gate_and_up(report):
    assert longest_sum(report) == ("Dgrad of dense: gate and up", 2 * 18432)
    assert bits_without(2 * 18432) == 23  # 288 times 128
    assert [bits_without(n) for n in (64, 128, 129, 256, 4096)] == [14, 14, 15, 15, 19]
    # Rows of an expert, from all devices that share it.
    wide = replace(report, train=replace(report.train, microbatches=10), pipeline=PipelineConfig())
    assert longest_sum(replace(wide, mesh=MeshConfig(1, 2, 8, 8)))[1] == 64 * 12 * 4096 * 8 // 256


@pytest.mark.slow
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("one_sign", [True, False])
def test_each_bit_doubles_the_sum_that_errs_as_much(one_sign, aligned):
    """The rule behind it, in the emulation; without more bits the error is larger."""
    generator, operands = np.random.default_rng(0), []
    for shape in ((8, 512), (512, 8)):
        x = generator.standard_normal(shape).astype("f4")
        x = np.abs(x) if one_sign else x
        operands.append(np.asarray(fake_quantize(x, shape, scale="pow2")))
    exact = operands[0].astype(float) @ operands[1].astype(float)

    def error(bits: int, interval: int) -> float:
        accumulator = Accumulator(bits=bits, interval=interval, aligned=aligned)
        found = jax.jit(emulated_matmul, static_argnums=2)(*operands, accumulator)
        return np.sqrt(np.mean((np.asarray(found, float) - exact) ** 2))

    reference = error(14, 128)
    promoted = promotion_of(replace(tiny_run(), quant=QuantConfig("fp8")), H100, BITS_16)
    assert promoted.allowed == 512
    assert error(16, 512) < 1.4 * reference
    assert error(14, 512) > 2 * reference


@pytest.mark.parametrize(
    ("what_if", "line"),
    [
        (WhatIf(accumulator_bits=11), "--what-if.accumulator-bits is 11; allowed: 12 to 32"),
        (WhatIf(promotion_interval=100), "--what-if.promotion-interval is 100; allowed: multiples"),
        (WhatIf(promotion_interval=0), "--what-if.promotion-interval is 0; allowed: multiples"),
    ],
)
def test_what_no_tensor_core_has_is_refused(what_if, line, report):
    with pytest.raises(ValueError, match=line):
        promotion_of(report, H800, what_if)


def test_without_fp8_or_a_peak_there_is_nothing_to_ask(report):
    with pytest.raises(ValueError, match=r"group-scales with quant\.recipe dtype; allowed"):
        predict(tiny_run(), H800, what_if=WhatIf(group_scales=True))
    with pytest.raises(ValueError, match="accumulator-bits with --hardware cpu; allowed: h800"):
        promotion_of(report, replace(H800, name="cpu", fp32=None), FREE)
