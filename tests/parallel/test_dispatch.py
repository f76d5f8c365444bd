"""The exchange equals its twins, whatever the routing and the mesh; and what it sends."""

import math
import re
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsv3_jax.model.block import rematerialised
from dsv3_jax.model.moe import MoE, Weights, block_rows
from dsv3_jax.model.router import choose_experts
from dsv3_jax.parallel.buckets import (
    ExchangePlan,
    local_table,
    make_exchange_plan,
    node_table,
    queue_of,
)
from dsv3_jax.parallel.copies import fill_slots
from dsv3_jax.parallel.dispatch import swapped
from dsv3_jax.parallel.mesh import TOKEN_AXES, parameter_name, varying, weight_spec
from dsv3_jax.parallel.wire import PLAIN, wire_of_rules
from dsv3_jax.quant.recipes import FP8
from dsv3_jax.quant.trained_weight import TrainedWeight
from tests.jaxprs import equations
from tests.parallel import simulated
from tests.parallel.exchanges import (
    MESHES,
    ROUTINGS,
    D,
    E,
    K,
    case,
    dense,
    fast,
    idle_expert,
    lognormal,
    mesh_of,
    on_mesh,
    one_by_one,
    one_expert,
    one_node,
    placed,
    uniform,
)
from tests.shapes import compiled, normal, random_part, tiny_model
from tests.tolerances import BFLOAT16, FLOAT32, FLOAT64, assert_close

TOKENS = 8 * 20
FACTORS = (1.0, 0.2, 4.0)  # of buckets: about two rounds, many, one


def plan_of(name: str, factor: float = 1.0) -> tuple[ExchangePlan, jax.sharding.Mesh]:
    cfg, mesh = mesh_of(MESHES[name])
    return ExchangePlan(E, cfg.node, cfg.local, min(cfg.node, K), factor), mesh


@cache
def program(name: str, factor: float = 1.0, twin: bool = False):
    """Compiled in the precision of the first call, so that all tests use it in float64."""
    plan, mesh = plan_of(name, factor)
    return on_mesh(mesh, dense if twin else fast(plan))


def check(name: str, factor: float, routing) -> object:
    """Results and all gradients are the twin's; returns the traffic."""
    arrays = case(routing, TOKENS)
    (y_TD, traffic), grads = program(name, factor)(*arrays)
    (wanted_TD, _), wanted = program(name, twin=True)(*arrays)
    assert_close((y_TD, grads), (wanted_TD, wanted), FLOAT64)
    np.testing.assert_array_equal(traffic.received.sum(), TOKENS * K)
    return traffic


@pytest.mark.parametrize("routing", ROUTINGS, ids=lambda r: r.__name__)
def test_nothing_is_dropped_whatever_the_routing(x64, routing):
    check("1x2x4", 1.0, routing)


def test_nothing_is_dropped_where_both_hops_overflow(x64):
    traffic = check("2x2x2", 0.2, lognormal)
    assert traffic.rounds.max() > 2 * 5  # a token's first hop may wait five rounds


PAIRS = [("2x2x2", 0.2), ("1x1x8", 1.0), ("4x1x2", 4.0), ("1x8x1", 0.2), ("1x4x2", 4.0)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "factor"), PAIRS)
@pytest.mark.parametrize("routing", [one_expert, lognormal], ids=lambda r: r.__name__)
def test_nothing_is_dropped_on_other_meshes(x64, name: str, factor: float, routing):
    check(name, factor, routing)


@pytest.mark.exhaustive
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("name", MESHES)
def test_nothing_is_dropped_on_any_mesh(x64, name: str, factor: float):
    for routing in ROUTINGS:
        check(name, factor, routing)


def test_the_twin_is_the_plain_sum_over_experts(x64):
    x_TD, experts_TK, gates_TK, weights, dy_TD = case(uniform, TOKENS)
    y_TD, pull = jax.vjp(
        lambda x, g, w: one_by_one(x, experts_TK, g, w),
        *map(jnp.asarray, (x_TD, gates_TK)),
        weights,
    )
    (found_TD, _), grads = program("1x2x4", twin=True)(x_TD, experts_TK, gates_TK, weights, dy_TD)
    assert_close((found_TD, grads), (y_TD, pull(jnp.asarray(dy_TD))), FLOAT64)


def test_rounds_are_as_few_as_the_fullest_bucket_allows(x64):
    even = check("1x2x4", 4.0, uniform)
    assert (even.rounds == 1).all()
    crowded = check("1x2x4", 1.0, one_node)  # all to two devices of one node
    # Hop 1 takes one round, since a bucket holds all 20 tokens; hop 2 takes the others.
    rounds = len(simulated_rounds(one_node))
    assert (crowded.rounds == rounds).all()
    assert rounds > 2


def simulated_rounds(routing) -> list:
    plan, _ = plan_of("1x2x4")
    return list(simulated.rounds(plan, case(routing, TOKENS)[1]))


def test_traffic_is_counted_from_the_routing(x64):
    traffic = jax.tree.map(np.asarray, check("1x2x4", 1.0, lognormal))
    experts_TK = case(lognormal, TOKENS)[1]
    device_TK, own_T = experts_TK // 2, np.arange(TOKENS) // 20
    for me in range(8):
        mine = device_TK[own_T == me]
        other_node = (mine // 4 != me // 4).any(-1)  # with two nodes there is one other
        assert traffic.received[me] == (device_TK == me).sum()
        assert traffic.crossing_tokens[me] == traffic.crossings[me] == other_node.sum()
        assert traffic.local_copies[me] == (mine % 4 != me % 4).sum()


# --- precision -----------------------------------------------------------------------------------


def in_fp8(weights: Weights) -> Weights:
    """The weights as a step's, quantised once."""
    rules = FP8["dispatched"], FP8["dispatched"], FP8["expert_after_swiglu"]
    return Weights(
        *(
            TrainedWeight(r.weight.quantize(jnp.asarray(w)), jnp.asarray(w), r)
            for w, r in zip(weights, rules, strict=True)
        )
    )


FP8_WIRE = wire_of_rules(FP8["dispatched"], FP8["expert_after_swiglu"])


@pytest.mark.parametrize(
    ("routing", "wire"),
    [
        pytest.param(uniform, FP8_WIRE, id="fp8"),
        pytest.param(uniform, PLAIN, id="float32", marks=pytest.mark.slow),
        pytest.param(one_node, FP8_WIRE, id="fp8-skewed", marks=pytest.mark.slow),
    ],
)
def test_fp8_equals_an_oracle_with_the_same_blocks(routing, wire):
    """And so does float32 on the same slots, which checks the oracle."""
    plan, mesh = plan_of("1x2x2")
    x_TD, experts_TK, gates_TK, weights, dy_TD = case(routing, 4 * 16, np.float32)
    weights = weights if wire == PLAIN else in_fp8(weights)
    (y_TD, _), found = on_mesh(mesh, fast(plan, wire))(x_TD, experts_TK, gates_TK, weights, dy_TD)
    layer = compiled(
        lambda x, g, w, dy: (lambda y, pull: (y, pull(dy)))(
            *jax.vjp(partial(simulated.simulated(plan, wire, 4), experts_TK=experts_TK), x, g, w)
        )
    )
    wanted_TD, wanted = layer(x_TD, gates_TK, weights, dy_TD)
    assert_close((y_TD, trained(found)), (wanted_TD, trained(wanted)), FLOAT32)


def trained(grads: tuple) -> list:
    return [g for g in jax.tree.leaves(grads) if g.dtype == jnp.float32]


@pytest.mark.slow
def test_bfloat16_rounds_between_devices_and_not_in_sums():
    plan, mesh = plan_of("1x2x4")
    x_TD, experts_TK, gates_TK, weights, dy_TD = case(uniform, TOKENS, np.float32)
    low = (jnp.asarray(a, jnp.bfloat16) for a in (x_TD, dy_TD))
    x_low, dy_low = low
    (y_TD, _), grads = on_mesh(mesh, fast(plan))(x_low, experts_TK, gates_TK, weights, dy_low)
    wanted, pull = jax.vjp(
        lambda x, g, w: one_by_one(x, experts_TK, g, w),
        x_low.astype(jnp.float32),
        jnp.asarray(gates_TK),
        weights,
    )
    assert y_TD.dtype == grads[0].dtype == jnp.bfloat16
    assert grads[2].gate.dtype == jnp.float32
    exact = wanted, pull(dy_low.astype(jnp.float32))
    assert_close(jax.tree.map(np.float32, (y_TD, grads)), jax.tree.map(np.float32, exact), BFLOAT16)


# --- what is sent --------------------------------------------------------------------------------


def sent(text: str) -> list[tuple[str, int, int]]:
    """Of every operand of an all-to-all of a compiled program: type, elements, last dimension."""
    found = []
    for line in text.splitlines():
        if " all-to-all(" in line:
            for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", line.split(" all-to-all(")[0]):
                sizes = [int(n) for n in shape.split(",")]
                found.append((kind, math.prod(sizes), sizes[-1]))
    return found


@cache
def forward_text(wire) -> str:
    """Compiled forward exchange of bfloat16 rows of 256."""
    plan, mesh = plan_of("1x2x4", 4.0)
    draw = np.random.default_rng(0)
    shapes = (E, WIDTH, 8), (E, WIDTH, 8), (E, 8, WIDTH)
    weights = Weights(*(draw.random(s, np.float32) for s in shapes))
    x_TD = jnp.asarray(draw.random((TOKENS, WIDTH)), jnp.bfloat16)
    gates_TK = draw.random((TOKENS, K), np.float32)
    arrays = x_TD, uniform(draw, TOKENS).astype(np.int32), gates_TK, weights
    rows = P(TOKEN_AXES)
    specs = rows, rows, rows, P(("node", "local"))
    body = jax.shard_map(
        lambda *args: fast(plan, wire)(*args)[0], mesh=mesh, in_specs=specs, out_specs=rows
    )
    return compiled(body).lower(*placed(mesh, specs, arrays)).compile().as_text()


WIDTH = 256


def test_payloads_travel_as_bytes_of_half_the_size():
    plain, fp8 = sent(forward_text(PLAIN)), sent(forward_text(FP8_WIRE))
    # XLA:CPU sends bfloat16 as float32; elements are counted. Half of the plain ones go there.
    there = sum(count for kind, count, last in plain if last == WIDTH) // 2
    back = sum(count for kind, count, last in fp8 if last == WIDTH and kind != "u8")
    values = sum(count for kind, count, last in fp8 if last == WIDTH and kind == "u8")
    scales = sum(count for kind, count, last in fp8 if last == WIDTH // 128 and kind == "u8")
    assert there == back == values > 0
    assert scales == values // 128
    assert routing_bytes(plain) == routing_bytes(fp8)


def routing_bytes(operands: list[tuple[str, int, int]]) -> int:
    """What tells of the routing: ids and gates."""
    return sum(4 * count for _, count, last in operands if last not in (WIDTH, WIDTH // 128))


@pytest.mark.parametrize("factor", [0.25, pytest.param(1.0, marks=pytest.mark.slow)])
def test_temporary_memory_is_bounded_by_the_buckets(factor: float):
    """As stated in `dispatch`, whatever is routed where: the program does not know."""
    plan, mesh = plan_of("1x2x4", factor)
    tokens, width, hidden = 512, 64, 32
    draw = np.random.default_rng(0)
    shapes = (E, width, hidden), (E, width, hidden), (E, hidden, width)
    weights = Weights(*(draw.random(s, np.float32) for s in shapes))
    x_TD = draw.random((8 * tokens, width), np.float32)
    gates_TK = draw.random((8 * tokens, K), np.float32)
    arrays = x_TD, one_node(draw, 8 * tokens).astype(np.int32), gates_TK, weights, x_TD
    found = on_mesh(mesh, fast(plan)).lower(*arrays).compile().memory_analysis()
    hop_1 = plan.nodes * plan.node_rows(tokens)
    hop_2 = plan.locals * plan.local_rows(tokens, K)
    blocks = hop_2 + plan.num_local * (block_rows(hop_2, plan.num_local) - 1)
    numbers = (hop_1 + hop_2 + blocks) * width + 3 * blocks * hidden
    gradients = sum(w[: plan.num_local].nbytes for w in weights)
    assert found.temp_size_in_bytes <= 4 * 4 * numbers + 2 * gradients


def test_weights_of_experts_stay_where_they_are():
    for wire in (PLAIN, FP8_WIRE):
        assert "all-gather" not in forward_text(wire)
        assert "all-reduce" in forward_text(wire)  # of the number of rounds


def test_no_token_crosses_to_more_nodes_than_groups_it_may_use():
    cfg = tiny_model(num_experts=32, num_groups=8, num_kept_groups=3, experts_per_token=6)
    mesh_cfg, mesh = mesh_of((1, 4, 2))
    plan = make_exchange_plan(mesh_cfg, cfg)
    assert plan.nodes_per_token == 3
    experts = choose_experts(normal(0, 8, 50, 32), cfg).reshape(400, 6)

    def nodes(experts_TK):
        queue = queue_of(plan, experts_TK)
        return queue.goes_TN.sum(-1)

    spec = P(TOKEN_AXES)
    body = jax.shard_map(nodes, mesh=mesh, in_specs=spec, out_specs=spec)
    counted_T = np.asarray(jax.jit(body)(*placed(mesh, (spec,), (experts,))))
    wanted_T = [len(set(row // 8)) for row in np.asarray(experts)]
    np.testing.assert_array_equal(counted_T, wanted_T)
    assert counted_T.max() <= 3
    assert counted_T.max() > 1


@pytest.mark.parametrize("routing", [uniform, one_expert, lognormal], ids=lambda r: r.__name__)
def test_each_node_and_each_copy_is_served_in_one_round_and_slot(routing):
    plan, mesh = plan_of("1x2x4", 0.5)
    turns = jnp.arange(20, dtype=jnp.int32)  # more than there can be

    def slots(experts_TK):
        queue = queue_of(plan, experts_TK)

        def of_node(turn):
            by_node = node_table(plan, queue, turn)
            rows = swapped(fill_slots(experts_TK + 1, by_node), "node") - 1
            by_local = jax.vmap(lambda t: local_table(plan, rows, len(experts_TK), t)[0].slot_RJ)
            return by_node.slot_RJ, by_local(turns)

        by_node, by_local = jax.vmap(of_node)(turns)
        in_node, in_local = plan.nodes * plan.node_rows(20), plan.locals * plan.local_rows(20, K)
        return (by_node < in_node).sum(0), (by_local < in_local).sum((0, 1, 2), keepdims=True)

    spec = P(TOKEN_AXES)
    body = jax.shard_map(slots, mesh=mesh, in_specs=spec, out_specs=spec)
    experts_TK = case(routing, TOKENS)[1]
    sent_TN, copies = jax.jit(body)(*placed(mesh, (spec,), (experts_TK,)))
    wanted_TN = (experts_TK[:, :, None] // 8 == np.arange(2)).any(1)
    np.testing.assert_array_equal(sent_TN, wanted_TN)
    assert copies.sum() == TOKENS * K


def test_the_oracle_serves_each_copy_once():
    for routing in (uniform, one_expert, idle_expert):
        served = [copy for slots in simulated_rounds(routing) for d in slots for copy in d if copy]
        assert sorted(served) == [(t, k) for t in range(TOKENS) for k in range(K)]


def test_the_shared_expert_waits_for_no_exchange(monkeypatch):
    """Compiled alone, what it computes needs no all-to-all."""
    cfg, mesh = mesh_of(MESHES["1x2x4"])
    model = replace(tiny_model(num_experts=16), d_model=D)
    moe = random_part(MoE, model)
    plan, seen = make_exchange_plan(cfg, model), []
    shared = type(moe.shared).__call__
    monkeypatch.setattr(
        type(moe.shared), "__call__", lambda self, x: seen.append(shared(self, x)) or seen[-1]
    )

    def layer(moe, x_BTD, *, whole: bool):
        y_BTD, _ = moe(x_BTD, jnp.ones(x_BTD.shape[:2], bool), plan)
        return y_BTD if whole else seen[-1]

    specs = jax.tree_util.tree_map_with_path(lambda path, _: weight_spec(parameter_name(path)), moe)
    x_BTD, rows = normal(1, 8, 5, D), P(TOKEN_AXES)
    for whole in (True, False):
        body = jax.shard_map(
            partial(layer, whole=whole), mesh=mesh, in_specs=(specs, rows), out_specs=rows
        )
        text = jax.jit(body).lower(*placed(mesh, (specs, rows), (moe, x_BTD))).compile().as_text()
        assert ("all-to-all" in text) == whole


def test_recomputation_sends_nothing_again():
    """What came is kept where norms and up-projections are computed twice; not where all is."""
    plan, mesh = plan_of("1x2x4")
    arrays = case(uniform, TOKENS, np.float32)[:4]
    rows = P(TOKEN_AXES)
    specs = rows, rows, rows, P(("node", "local"))

    def sends(remat) -> int:
        def loss(x_TD, experts_TK, gates_TK, weights):
            def layer(x_TD, gates_TK, weights):
                return fast(plan)(x_TD, experts_TK, gates_TK, weights)[0]

            return rematerialised(layer, remat, scanned=False)(x_TD, gates_TK, weights).sum()

        def grads(x_TD, experts_TK, gates_TK, weights):
            weights = varying(weights, TOKEN_AXES)
            return jax.grad(loss, (0, 2, 3))(x_TD, experts_TK, gates_TK, weights)

        body = jax.shard_map(grads, mesh=mesh, in_specs=specs, out_specs=(rows, rows, rows))
        found = equations(body, *placed(mesh, specs, arrays))
        return sum(equation.primitive.name == "all_to_all" for equation in found)

    assert sends("none") == sends("report") < sends("full")
