"""What the health program finds against counts in NumPy, its entries and its part of the page."""

import json
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import QuantConfig, RunConfig
from dsv3_jax.data.packing import Row
from dsv3_jax.model.router import RouterBias
from dsv3_jax.quant.recipes import FP8, Operand
from dsv3_jax.train import quant_health
from dsv3_jax.train.metrics import strict_json
from dsv3_jax.train.page import page_html
from dsv3_jax.train.quant_health import KINDS, Health, make_probe, measure, not_finite
from dsv3_jax.train.quant_page import table
from dsv3_jax.train.quantized_weights import quantize_weights
from dsv3_jax.train.records import quant_record
from dsv3_jax.train.snapshot import Position
from dsv3_jax.train.step import TrainState
from tests.logged import CFG, RESULT, make_entries
from tests.shapes import FAST_COMPILATION, compiled, random_model, random_tokens, tiny_model

T = 8


def run_of(recipe: str, microbatches: int = 1) -> RunConfig:
    model = tiny_model(num_layers=1, mtp_depth=1)
    data = replace(CFG.data, length=T)
    rows = 2 * microbatches
    train = replace(CFG.train, rows=rows, microbatches=microbatches, dtype="float32")
    train = replace(train, balance_weight=1.0)
    return replace(CFG, model=model, data=data, train=train, quant=QuantConfig(recipe))


@cache
def program(microbatches: int = 1):
    """The one for all tests of this file but one, and the state it is for."""
    cfg = run_of("fp8", microbatches)
    graphdef, params, biases = nnx.split(random_model(cfg.model), nnx.Param, RouterBias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quant_health, "UNOPTIMISED", FAST_COMPILATION)
        return make_probe(graphdef, cfg), TrainState(params, biases, None)


@cache
def probed(
    broken: bool = False, mtp_weight: float = 0.3, first_row: int = 0, microbatches: int = 1
):
    """The program's answer about a random model, one of whose weights may hold a NaN, and the two
    rows from that one on.
    """
    probe, state = program(microbatches)
    if broken:
        state = jax.tree.map(lambda x: x, state)
        weight = state.params["dense_layers"]["mla"]["w_o_HU_D"]
        weight.set_value(weight.get_value().at[0, 1, 2].set(np.nan))
    tokens = np.asarray(random_tokens(run_of("fp8").model, 4, T + 1))[first_row:]
    return probe(state, [Row(row[:-1], row[1:], None) for row in tokens], mtp_weight)


def test_shares_and_scales_are_those_counted_by_hand():
    x = np.zeros((4, 256), np.float32)
    x[0, :128] = 896  # scale 2
    x[0, 1:5] = 2.0**-10  # a quarter of the smallest number
    x[1, 128:] = 4480  # scale 10
    x[2, 0], x[2, 1] = np.nan, np.inf
    x[2, 2] = 1344  # scale 3; the scales of other blocks, all zero, are 1
    nonzero = 128 + 128 + 3
    found = Health(*compiled(lambda x: measure(x[None], Operand((1, 128))))(x).tolist())
    assert found.underflow == pytest.approx(4 / nonzero)
    assert found.saturation == 0
    assert found.not_finite == pytest.approx(2 / nonzero)
    assert found.smallest_scale == pytest.approx(2)
    assert found.largest_scale == pytest.approx(10)


def test_what_a_power_of_two_scale_cuts_off_is_saturation():
    x = np.full((1, 32), 1.0, np.float32)
    x[0, :3] = 1.9  # over 2^-8: 486, above 448
    found = Health(*compiled(lambda x: measure(x[None], Operand((1, 32), scale="mx")))(x).tolist())
    assert found.saturation == pytest.approx(3 / 32)


def test_every_quantised_parameter_of_every_layer_is_told_of():
    found, state = probed(), program()[1]
    names = jax.eval_shape(lambda params: quantize_weights(params, FP8), state.params)
    assert set(found) == {name.replace("dense_layers.", "layers.0.") for name in names}
    for kinds in found.values():
        assert tuple(kinds) == KINDS
        for health in kinds.values():
            assert 0 <= health.underflow < 0.2
            assert health.saturation == health.not_finite == 0
            assert 0 < health.smallest_scale <= health.largest_scale < 10
    # Gate and up share what they multiply.
    gate, up = (found[f"mtp.0.block.moe.{name}"] for name in ("w_gate_EDF", "w_up_EDF"))
    assert gate["input"] == up["input"]
    assert gate["gradient"] == up["gradient"]
    assert gate["weight"] != up["weight"]
    assert not not_finite(found)


def test_what_is_not_finite_is_named_where_it_is():
    found, name = probed(broken=True), "layers.0.mla.w_o_HU_D"
    assert found[name]["weight"].not_finite == pytest.approx(1 / (12 * 32))
    assert found[name]["input"].not_finite == 0
    assert found["mtp.0.block.mla.w_o_HU_D"]["weight"].not_finite == 0
    assert found["mtp.0.block.mla.w_o_HU_D"]["input"].not_finite > 0
    assert not_finite(found).endswith("more")
    alone = {name: {"weight": found[name]["weight"], "input": found[name]["input"]}}
    assert not_finite(alone) == f"weight of {name}"


def test_operands_rows_and_weight_of_the_loss_are_those_of_training():
    found, name = probed(), "mtp.0.block.moe.w_down_EFD"
    fractions = {kind: np.frexp(found[name][kind].smallest_scale)[0] for kind in KINDS}
    assert fractions["gradient"] == 0.5  # a power of two, which the input's scale is not
    assert fractions["input"] != 0.5
    one, two = (probed(mtp_weight=weight)[name]["gradient"] for weight in (0.25, 0.5))
    assert two.largest_scale == 2 * one.largest_scale
    other = probed(first_row=1)["layers.0.mla.w_dq_DQ"]["input"]
    assert other != probed()["layers.0.mla.w_dq_DQ"]["input"]


@pytest.mark.slow
def test_of_two_micro_batches_one_has_half_the_gradient():
    """Of all parts of the loss, that of balance too; what two such would give is the step's."""
    whole, part = probed(), probed(microbatches=2)
    for name, kinds in whole.items():
        assert part[name]["gradient"].largest_scale == kinds["gradient"].largest_scale / 2
        assert part[name]["input"] == kinds["input"]


def test_tensors_of_zeros_have_no_scales():
    zeros = compiled(lambda x: measure(x, Operand((1, 128))))(jnp.zeros((1, 4, 8)))
    nothing, some = Health(*zeros.tolist()), Health(0.0, 0.0, 0.0, 0.5, 2.0)
    assert nothing[:3] == (0, 0, 0)
    assert np.isnan(nothing[3:]).all()
    for healths, shown in (((nothing, some), "0.5 to 2"), ((nothing,), "–")):
        layers = {f"layers.{i}.mla.w_o": dict.fromkeys(KINDS, h) for i, h in enumerate(healths)}
        entry = quant_record(run_of("fp8"), Position(step=1, consumed_rows=2), layers)
        entry = json.loads(strict_json(entry))
        assert {row[-1] for row in table([entry])} == {shown}
        assert "Low precision" in page_html("run", CFG, "machine", [*make_entries(), entry], None)


def test_a_recipe_of_nothing_has_no_such_program():
    assert make_probe(None, run_of("dtype")) is None


def test_entries_are_json_and_the_page_shows_them():
    cfg = run_of("fp8")
    entries = [
        quant_record(cfg, Position(step=step, consumed_rows=2 * step), probed(broken=step == 4))
        for step in (2, 4)
    ]
    entries = [json.loads(json.dumps(entry)) for entry in entries]
    page = page_html("run", cfg, "machine", [*make_entries(), *entries], RESULT)
    assert "Low precision" in page
    assert "recipe fp8" in page
    rows = table(entries)
    assert {row[0] for row in rows} == set(KINDS)
    assert len({row[:2] for row in rows}) == len(rows)
    assert "Low precision" not in page_html("run", cfg, "machine", make_entries(), RESULT)
