"""Low precision in a training step: who is quantised, what is kept, where gradients go."""

from dataclasses import replace
from functools import cache
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import DataConfig, QuantConfig, RunConfig, TrainConfig
from dsv3_jax.config.presets import bench_cpu, dsv3_671b
from dsv3_jax.config.quant import RecipeName
from dsv3_jax.data.loader import Batch
from dsv3_jax.data.packing import Row
from dsv3_jax.model.precision import CLASSES, class_of
from dsv3_jax.model.router import RouterBias
from dsv3_jax.parallel.mesh import parameter_name
from dsv3_jax.quant.fp8 import quantize
from dsv3_jax.quant.fp8_gemm import ACTIVATION_INPUT, INPUT
from dsv3_jax.quant.recipes import FP8, RECIPES
from dsv3_jax.quant.trained_weight import TrainedWeight
from dsv3_jax.train.metrics import read_metrics
from dsv3_jax.train.quantized_weights import quantize_weights, with_quantized_weights
from dsv3_jax.train.step import TrainState, abstract_state, gradients
from dsv3_jax.train.validation import make_validate
from tests.jaxprs import equations
from tests.runs import SmallRun, assert_same_checkpoint
from tests.shapes import compiled, random_model, random_tokens, tiny_model

T = 8
RUN = RunConfig(
    # Near 0, so that routing hangs on no last bit.
    model=tiny_model(num_layers=1, init_std=0.05),
    data=DataConfig(length=T),
    train=TrainConfig(rows=4, dtype="float32", balance_weight=0.0),
    quant=QuantConfig("fp8"),
)
KEPT = (INPUT, ACTIVATION_INPUT)


def parts_of(cfg: RunConfig) -> tuple[nnx.GraphDef, TrainState, Batch]:
    graphdef, params, biases = nnx.split(random_model(cfg.model), nnx.Param, RouterBias)
    sequence = random_tokens(cfg.model, cfg.train.rows, T + 1)
    return graphdef, TrainState(params, biases, None), Batch(sequence[:, :-1], sequence[:, 1:])


@cache
def gradients_of(cfg: RunConfig):
    graphdef, state, batch = parts_of(cfg)
    run = compiled(lambda state, batch: gradients(graphdef, state, batch, jnp.float32(0.3), cfg))
    return run(state, batch)[:2]


def distance(actual, expected) -> list[float]:
    """Relative, for every tensor."""
    actual, expected = (map(np.asarray, jax.tree.leaves(tree)) for tree in (actual, expected))
    pairs = zip(actual, expected, strict=True)
    return [np.sqrt(np.sum((a - b) ** 2) / max(np.sum(b**2), 1e-60)) for a, b in pairs]


def test_classes_are_the_reports():
    """The output projection alone follows attention; only routed experts have dispatched inputs."""
    kinds = {
        "linear": "mla.w_q_D_HNR mla.w_dq_DQ mla.w_uq_Q_HNR mla.w_dkv_D_CR mla.w_ukv_C_HNU "
        "dense.w_gate_DF dense.w_up_DF moe.shared.w_gate_DF moe.shared.w_up_DF",
        "after_attention": "mla.w_o_HU_D",
        "dispatched": "moe.w_gate_EDF moe.w_up_EDF",
        "after_swiglu": "dense.w_down_FD moe.shared.w_down_FD",
        "expert_after_swiglu": "moe.w_down_EFD",
    }
    for kind, names in kinds.items():
        for name in names.split():
            assert class_of(f"moe_layers.{name}") == class_of(f"mtp.0.block.{name}") == kind


def test_masters_are_quantised_as_they_are():
    """Not from the activations' dtype."""
    params = parts_of(RUN)[1].params
    master = params["mtp"][0]["block"]["mla"]["w_dq_DQ"].get_value()
    assert np.any(np.asarray(master) != np.asarray(master, jnp.bfloat16).astype(np.float32))
    found = jax.jit(lambda p: quantize_weights(p, FP8)["mtp.0.block.mla.w_dq_DQ"])(params)
    expected = jax.jit(lambda w: quantize(w, (128, 128)))(master)
    assert np.array_equal(found.values.view(jnp.uint8), expected.values.view(jnp.uint8))
    assert np.array_equal(found.scales, expected.scales)


def test_every_parameter_of_the_table_is_found_and_no_other_is_quantised():
    """The table's names are the model's, with and without latent queries."""
    found = {}
    for latent in (24, None):
        model = random_model(tiny_model(q_latent=latent))
        for path, x in jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Param)):
            found[parameter_name(path)] = x.shape
    ends = {end for end in CLASSES if any(name.endswith(end) for name in found)}
    assert ends == set(CLASSES)
    high = {name for name in found if class_of(name) is None}
    assert all(
        any(part in name for part in ("norm", "embed", "head", "router", "w_proj")) for name in high
    )
    assert all(len(found[name]) >= 2 for name in set(found) - high)


def test_every_name_of_a_recipe_has_one():
    assert set(RECIPES) == set(get_args(RecipeName))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_class_of_linears_has_a_rule_or_none_has(recipe: str):
    assert set(RECIPES[recipe]) in (set(), set(CLASSES.values()))


def test_gradients_go_to_the_masters_and_are_near_those_of_float32():
    """E4M3 has a unit roundoff of 1/16: single products are off by less than a tenth."""
    total, grads = gradients_of(RUN)
    exact_total, exact = gradients_of(replace(RUN, quant=QuantConfig("f32")))
    assert abs(total - exact_total) < 1e-3 * exact_total
    assert jax.tree.structure(grads) == jax.tree.structure(exact)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    errors = distance(grads, exact)
    assert 0.005 < np.median(errors) < 0.1
    assert max(errors) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["report", "full"])
def test_recomputation_changes_no_more_than_some_last_bits(remat: str):
    """A last bit moves a number of E4M3 now and then, so tensors agree as a whole."""
    _, expected = gradients_of(RUN)
    _, actual = gradients_of(replace(RUN, train=replace(RUN.train, remat=remat)))
    assert max(distance(actual, expected)) < 1e-3


@pytest.mark.slow
def test_micro_batches_are_steps_of_their_own_that_add_up():
    """Tiles along the tokens end where a micro-batch ends."""
    _, actual = gradients_of(replace(RUN, train=replace(RUN.train, microbatches=2)))
    graphdef, state, batch = parts_of(RUN)
    half = replace(RUN, train=replace(RUN.train, rows=2))
    run = compiled(lambda state, batch: gradients(graphdef, state, batch, jnp.float32(0.3), half))
    parts = (Batch(*(x[rows] for x in batch[:2])) for rows in (np.s_[:2], np.s_[2:]))
    halves = [run(state, part)[1] for part in parts]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    assert max(distance(actual, mean)) < 1e-3


def test_weights_are_quantised_once_before_the_micro_batches():
    cfg = replace(RUN, train=replace(RUN.train, microbatches=2))
    graphdef, state, batch = parts_of(cfg)
    traced = jax.make_jaxpr(lambda s, b: gradients(graphdef, s, b, jnp.float32(0.3), cfg))
    (scan,) = [
        eqn
        for eqn in traced(state, batch).jaxpr.eqns
        if eqn.primitive.name == "scan" and eqn.params["length"] == 2
    ]
    in_fp8 = [v.aval.shape for v in scan.invars if v.aval.dtype == jnp.float8_e4m3fn]
    blocks = jax.eval_shape(lambda params: quantize_weights(params, FP8), state.params)
    assert sorted(in_fp8) == sorted(b.shape for b in blocks.values())


def test_a_recipe_of_nothing_leaves_the_parameters_alone():
    params = parts_of(RUN)[1].params
    assert not quantize_weights(params, {})
    assert jax.tree.structure(with_quantized_weights(params, {})) == jax.tree.structure(params)
    in_fp8 = jax.eval_shape(lambda params: with_quantized_weights(params, FP8), params)
    assert jax.tree.structure(in_fp8) != jax.tree.structure(params)


def kept(cfg: RunConfig) -> list[tuple[str, str, int]]:
    """Name, type and bytes of each array that a linear or SwiGLU keeps; what two linears share
    counts once where it is one array.
    """
    graphdef, shapes = abstract_state(cfg)
    array = jax.ShapeDtypeStruct((cfg.train.rows, cfg.data.length), jnp.int32)

    def run(state, batch):
        return gradients(graphdef, state, batch, jnp.float32(0.3), cfg)

    found = {}
    for eqn in equations(run, shapes, Batch(array, array)):
        if eqn.primitive.name == "name" and eqn.params["name"] in KEPT:
            aval = eqn.outvars[0].aval
            found[eqn.invars[0]] = (
                eqn.params["name"],
                aval.str_short(),
                aval.size * aval.dtype.itemsize,
            )
    return list(found.values())


@pytest.mark.parametrize(
    "preset",
    [dsv3_671b, pytest.param(bench_cpu, marks=pytest.mark.slow)],
    ids=lambda preset: preset.__name__,
)
def test_fp8_keeps_at_most_55_percent_of_what_bf16_keeps(preset, capsys):
    """Of one dense and one MoE layer, bytes kept by linears and SwiGLU together."""
    model = replace(preset(), num_layers=2, num_dense_layers=1, mtp_depth=0)
    totals = {}
    for recipe in ("bf16", "fp8"):
        cfg = RunConfig(
            model, DataConfig(length=4096), TrainConfig(rows=1), quant=QuantConfig(recipe)
        )
        arrays = kept(cfg)
        totals[recipe] = sum(size for *_, size in arrays)
        with capsys.disabled():
            print(f"\n{preset.__name__}, {recipe}: {totals[recipe] / 1e6:,.1f} MB")
            for name, kind, size in arrays:
                print(f"  {size / 1e6:9.2f} MB  {kind:28} {name}")
    assert totals["fp8"] <= 0.55 * totals["bf16"]


def test_what_is_named_is_what_the_backward_pass_takes():
    """The list above is no fiction: of a linear's arrays, the backward pass holds those and its
    arguments.
    """
    from dsv3_jax.quant.gemm import linear

    x, w = jnp.ones((256, 128), jnp.bfloat16), jnp.ones((128, 384))

    def residuals(x, w):
        rule = FP8["linear"]
        weight = TrainedWeight(rule.weight.quantize(jax.lax.stop_gradient(w)), w, rule)
        return jax.tree.leaves(jax.vjp(lambda x, w: linear(x, replace(weight, slot=w)), x, w)[1])

    sizes = [(leaf.shape, str(leaf.dtype)) for leaf in jax.eval_shape(residuals, x, w)]
    weight = [((128, 384), "float8_e4m3fn"), ((1, 3), "float32")]
    assert sorted(sizes) == sorted([((256, 128), "float8_e4m3fn"), ((256, 1), "float32"), *weight])


@pytest.mark.slow
def test_a_run_in_fp8_tells_its_health_and_resumes_bit_for_bit(small: SmallRun):
    # A dense layer, and one with experts: MTP's
    fp8 = ("--config", small.config, "--quant.recipe", "fp8", "--model.num_layers", 1)
    fp8 += ("--output.name", "fp8")
    assert small.train(*fp8, pictures=True) == 0
    assert small.train(*fp8, "--train.steps", 4) == 0
    whole, half = (small.home / "runs" / f"fp8-00{i}" for i in (1, 2))
    assert small.train("--resume", half, "--train.steps", 6) == 0
    assert_same_checkpoint(whole, half, 6)
    health = [e for e in read_metrics(whole / "metrics.jsonl") if e["kind"] == "quant"]
    assert [entry["step"] for entry in health] == [3, 6]
    assert all(entry["recipe"] == "fp8" for entry in health)
    assert "Low precision" in (whole / "report.html").read_text()
    before = (whole / "metrics.jsonl").read_text()
    assert small.train("--resume", whole) == 0
    assert (whole / "metrics.jsonl").read_text() == before


def test_validation_computes_in_the_recipe():
    """Of an FP8 run it is the loss of the weights as they were trained."""
    graphdef, state, batch = parts_of(RUN)
    rows = [Row(*pair, None) for pair in zip(*map(np.asarray, batch[:2]), strict=True)]
    lengths_V = np.ones(RUN.model.vocab_size, int)
    losses = [
        make_validate(graphdef, replace(RUN, quant=QuantConfig(recipe)), lengths_V)(
            state, rows, range(4)
        ).loss
        for recipe in ("f32", "fp8")
    ]
    assert losses[0] != losses[1]
    np.testing.assert_allclose(*losses, rtol=1e-3)
