"""Bytes between devices, counted one by one."""

from dataclasses import replace

import pytest

from dsv3_jax.config import MeshConfig, ModelConfig, PipelineConfig, QuantConfig, RunConfig
from dsv3_jax.config.presets import dsv3_671b, moe_16b, tiny, tiny_run
from dsv3_jax.config.quant import RecipeName
from dsv3_jax.parallel.stages import whole
from dsv3_jax.parallel.wire import PLAIN, wire_of_rules
from dsv3_jax.plan.hardware import H800
from dsv3_jax.plan.layer_time import Job
from dsv3_jax.plan.parameters import Parameters
from dsv3_jax.plan.step_time import Stepper
from dsv3_jax.plan.traffic import (
    FP8_DISPATCH,
    FP8_GRADIENTS,
    Weights,
    exchange_of,
    fp8_row,
    gather_of,
    message_bytes,
    plain_row,
    tokens_of_microbatch,
    weights_of,
    zero_traffic,
)
from dsv3_jax.quant.recipes import RECIPES


def report(**changes) -> RunConfig:
    """V3's job with small rows."""
    run = tiny_run()
    return replace(
        run,
        model=dsv3_671b(),
        data=replace(run.data, length=4096),
        train=replace(run.train, rows=15360, microbatches=120),
        quant=QuantConfig("fp8"),
        mesh=MeshConfig(16, 2, 8, 8),
        pipeline=PipelineConfig("dualpipe"),
        **changes,
    )


def test_a_dispatched_token_of_v3():
    assert fp8_row(7168) == 7392
    assert plain_row(7168) == 14336
    assert fp8_row(130) == 130 + 8  # a short last block has a scale too


def test_a_token_crosses_to_each_node_once_and_then_to_each_expert():
    traffic = exchange_of(report())
    assert (traffic.dispatch, traffic.combine, traffic.gradient_dispatch) == (7392, 14336, 7392)
    assert traffic.node_hop(traffic.dispatch) == 4 * 7392
    assert traffic.local_hop(traffic.dispatch) == 8 * 7392


def test_latents_of_shared_rows_cross_once_forward_and_twice_back():
    """V3's 32K rows over the eight devices of a node: 7 / 8 of 576 numbers a token, in bfloat16;
    back once more, and their gradients in float32.
    """
    assert gather_of(report()) is None
    cfg = report()
    mesh = replace(cfg.mesh, sequence="local")
    cfg = replace(cfg, model=replace(cfg.model, max_length=32768), mesh=mesh)
    cfg = replace(
        cfg,
        data=replace(cfg.data, length=32768),
        train=replace(cfg.train, rows=1920, microbatches=120),
    )
    assert tokens_of_microbatch(cfg) == 4096
    assert message_bytes(cfg) == 4096 * 7168 * 2
    others = 32768 * 7 // 8 * 576
    gather = gather_of(cfg)
    assert (gather.forward, gather.backward) == (2 * others, (2 + 4) * others)
    assert gather.held == (2 + 4 + 4) * 32768 * 576


@pytest.mark.parametrize(
    ("recipe", "there", "back"),
    [
        ("bf16", 14336, 14336),
        ("fp8_per_tensor", 14336, 14336),
        ("fp8_square_gradients", 7392, 14336),
        ("fp8_pow2", 7392, 7392),
    ],
)
def test_rows_are_fp8_where_the_recipe_sends_them_so(recipe, there, back):
    traffic = exchange_of(replace(report(), quant=QuantConfig(recipe)))
    assert (traffic.dispatch, traffic.gradient_dispatch, traffic.combine) == (there, back, 14336)


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_sent_in_fp8_is_what_the_recipes_rules_send(recipe: RecipeName):
    """These names spare a plan's --help from loading JAX."""
    rules = RECIPES[recipe]
    wire = wire_of_rules(rules["dispatched"], rules["expert_after_swiglu"]) if rules else PLAIN
    assert (recipe in FP8_DISPATCH, recipe in FP8_GRADIENTS) == (bool(wire.there), bool(wire.back))


@pytest.mark.parametrize(
    ("mesh", "hops"),
    [(MeshConfig(local=4), (0, 8)), (MeshConfig(node=4), (4, 0)), (MeshConfig(node=2), (2, 0))],
)
def test_hops_that_are_none_send_nothing(mesh, hops):
    traffic = exchange_of(replace(report(), mesh=mesh, pipeline=PipelineConfig()))
    assert (traffic.node_hop(1), traffic.local_hop(1)) == hops


def test_without_a_mesh_or_experts_nothing_is_exchanged():
    assert exchange_of(tiny_run()) is None
    dense = replace(dsv3_671b(), num_dense_layers=61, mtp_depth=0)
    assert exchange_of(replace(report(), model=dense)) is None


def test_float32_takes_twice_the_bytes():
    cfg = replace(report(), quant=QuantConfig("f32"))
    assert exchange_of(cfg).dispatch == exchange_of(cfg).combine == 2 * 14336
    assert message_bytes(cfg) == 2 * message_bytes(report())


def test_messages_and_tokens_of_a_device():
    assert tokens_of_microbatch(report()) == 15360 // 120 // 128 * 4096 == 4096
    assert message_bytes(report()) == 4096 * 7168 * 2


def counted(model: ModelConfig) -> int:
    """All parameters but gains of norms and router biases."""
    count, layers = model.param_count(), model.num_layers + model.mtp_depth
    norms = layers * (2 * model.d_model + model.kv_latent + (model.q_latent or 0))
    norms += model.d_model * (1 + 3 * model.mtp_depth)
    return (
        count.main
        + count.mtp
        - norms
        - (model.num_moe_layers + model.mtp_depth) * (model.num_experts)
    )


@pytest.mark.parametrize("model", [dsv3_671b(), moe_16b(), tiny()], ids=["v3", "16b", "tiny"])
def test_weights_of_a_whole_model_are_its_parameters(model):
    cfg = replace(tiny_run(), model=model)
    weights = weights_of(cfg, [whole(model.num_layers, model.mtp_depth)])
    assert weights.shared + weights.experts == counted(model)
    assert weights.owned(cfg) == counted(model)
    assert weights.crossing(cfg) == 0


@pytest.fixture(scope="module")
def parameters() -> Parameters:
    """Of V3's job, the oracle: tensor by tensor."""
    return Parameters(report())


@pytest.mark.parametrize(
    ("schedule", "stages"),
    [
        ("1f1b", ""),
        ("1f1b", "E+4" + 14 * "|4" + "|1+H|M"),
        ("dualpipe", ""),
        ("dualpipev", ""),
    ],
)
def test_ranks_hold_and_own_what_the_memory_plan_says(parameters, schedule: str, stages: str):
    """MTP's copies of embedding and head among what is held, and not among what is owned."""
    mesh = MeshConfig(1 + stages.count("|") if stages else 16, 2, 8, 8)
    cfg = replace(report(), mesh=mesh, pipeline=PipelineConfig(schedule, stages))
    for held, owned in Stepper(Job(cfg, H800)).rank_cuts:
        weights = weights_of(cfg, held)
        gradients = parameters.gradients(held)
        assert 4 * (weights.shared + weights.experts) == pytest.approx(gradients, rel=1e-3)
        masters = sum(parameters.state(cut)["masters"] for cut in owned)
        own = weights_of(cfg, owned, borrowed=False).owned(cfg)
        assert 4 * own == pytest.approx(masters, rel=1e-3)


def test_zero_moves_what_others_own():
    cfg = report()
    held, mastered = Weights(1280, 60), Weights(640, 20)
    traffic = zero_traffic(cfg, held, mastered)
    crossing = 1280 * 127 / 128 + 60 / 2
    owned = 640 / 128 + 20 / 2
    others = 640 / 128 + 40 / 2
    assert traffic.scatter == 4 * crossing
    assert traffic.gather == 2 * crossing
    assert traffic.swap == 6 * others
    assert traffic.update == 22 * owned
    assert zero_traffic(cfg, held, held).swap == 0
