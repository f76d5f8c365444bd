"""MoE by blocks against the dense twin; every property of the layout that the blocks rely on."""

from dataclasses import replace
from functools import partial
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.model.moe import Layout, MoE, block_rows, lay_out, num_blocks
from dsv3_jax.model.router import Routing
from dsv3_jax.quant.swiglu import swiglu
from tests.shapes import compiled, normal, random_part, tiny_model
from tests.tolerances import BFLOAT16, FLOAT32, FLOAT64, assert_close

D, F = 8, 6


def make(num_experts: int, dtype=jnp.float64, **changes) -> MoE:
    cfg = tiny_model(num_groups=1, num_kept_groups=1, experts_per_token=1)
    sizes = {"d_model": D, "expert_hidden": F, "num_experts": num_experts}
    return random_part(MoE, replace(cfg, **sizes, **changes), dtype)


def route(tokens: int, k: int, experts: list[int], dtype=None) -> Routing:
    """Each token to k different ones of `experts`, with gates in (0, 1), as rows of one batch."""
    draw = np.random.default_rng(tokens)
    ids = [draw.choice(experts, k, replace=False) for _ in range(tokens)]
    gates = draw.random((1, tokens, k))
    return Routing(jnp.asarray([ids], jnp.int32), jnp.asarray(gates, dtype))


def value_and_gradients(method: str, moe: MoE, x, routing: Routing, dy) -> tuple:
    """y, and gradients of the module (zeros for its shared and router parts), of x and gates."""
    return _value_and_gradients(method, moe, x, routing.gates_BTK, routing.experts_BTK, dy)


@partial(compiled, static_argnums=0)
def _value_and_gradients(method, moe, x, gates, experts, dy):
    def call(moe, x, gates):
        y = getattr(moe, method)(x, Routing(experts, gates))
        return y if method == "dense_experts" else y[0]

    y, pull = jax.vjp(call, moe, x, gates)
    return y, pull(dy)


CASES = {  # experts of the layer, tokens, experts they go to, experts of each token
    "one token": (4, 1, [1, 2], 2),
    "blocks of 4": (4, 9, [0, 1, 2, 3], 2),
    "all to the same two": (4, 9, [1, 3], 2),
    "some experts idle": (4, 9, [0, 2, 3], 2),
    "blocks of 128": (2, 300, [0, 1], 1),
    "all to one expert": (2, 300, [1], 1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_blocks_equal_the_dense_twin(x64, strict_dtypes, case: tuple):
    """Values, and gradients of x, of all expert weights and of the gates."""
    num_experts, tokens, experts, k = case
    moe, routing = make(num_experts), route(tokens, k, experts)
    args = moe, normal(1, 1, tokens, D), routing, normal(2, 1, tokens, D)
    actual = value_and_gradients("routed", *args)
    assert_close(actual, value_and_gradients("dense_experts", *args), FLOAT64)
    dmoe = actual[1][0]
    for dw in (dmoe.w_gate_EDF, dmoe.w_up_EDF, dmoe.w_down_EFD):
        used = np.flatnonzero(np.abs(dw[...]).max((1, 2)))
        np.testing.assert_array_equal(used, np.unique(routing.experts_BTK))


def test_block_sizes_are_the_average_share_between_1_and_128():
    rows = {name: block_rows(tokens * k, e) for name, (e, tokens, _, k) in CASES.items()}
    assert (rows["one token"], rows["blocks of 4"], rows["blocks of 128"]) == (1, 4, 128)
    assert [block_rows(copies, 8) for copies in (1, 15, 16, 255, 1023, 10**6)] == [
        1,
        1,
        2,
        16,
        64,
        128,
    ]


def test_the_dense_twin_is_the_sum_over_gates(x64):
    """By a loop over tokens and their experts."""
    moe, x, routing = make(4), normal(1, 2, 3, D), route(6, 2, [0, 1, 2, 3])
    routing = Routing(*(part.reshape(2, 3, 2) for part in routing))
    gate, up, down = (np.asarray(w[...]) for w in (moe.w_gate_EDF, moe.w_up_EDF, moe.w_down_EFD))
    expected = np.zeros(x.shape)
    for b, t, k in np.ndindex(2, 3, 2):
        e, token = routing.experts_BTK[b, t, k], np.asarray(x[b, t])
        hidden = np.asarray(swiglu(np.concatenate([token @ gate[e], token @ up[e]])))
        expected[b, t] += routing.gates_BTK[b, t, k] * (hidden @ down[e])
    assert_close(compiled(moe.dense_experts)(x, routing), expected, FLOAT64)


def test_blocks_equal_the_dense_twin_in_float32_and_bfloat16():
    """bfloat16: activations only; the weights and their gradients are float32."""
    routing, dy = route(9, 2, [0, 1, 2, 3]), normal(2, 1, 9, D)
    args = make(4, jnp.float32), normal(1, 1, 9, D), routing, dy
    expected = value_and_gradients("dense_experts", *args)
    assert_close(value_and_gradients("routed", *args), expected, FLOAT32)
    narrow = args[0], args[1].astype(jnp.bfloat16), routing, dy.astype(jnp.bfloat16)
    y, (dmoe, dx, dgates) = value_and_gradients("routed", *narrow)
    assert (y.dtype, dmoe.w_up_EDF.dtype, dx.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
    assert_close((y, (dmoe, dx, dgates)), expected, BFLOAT16)


def test_the_layer_is_shared_plus_routed_experts(x64, strict_dtypes):
    moe, x = make(4, experts_per_token=2), normal(1, 2, 3, D)
    valid = jnp.ones((2, 3), bool)

    def parts(x):
        routing, stats = moe.router(x, valid)
        return (moe.shared(x) + moe.dense_experts(x, routing), stats)

    assert_close(compiled(moe)(x, valid), compiled(parts)(x), FLOAT64)
    assert moe.shared.w_up_DF.shape == (D, F)
    assert make(4, num_shared_experts=3).shared.w_up_DF.shape == (D, 3 * F)


def test_without_shared_experts_the_routed_ones_remain(x64, strict_dtypes):
    moe, x = make(4, experts_per_token=2, num_shared_experts=0), normal(1, 2, 3, D)
    valid = jnp.ones((2, 3), bool)
    assert moe.shared is None
    expected = compiled(lambda x: moe.dense_experts(x, moe.router(x, valid)[0]))(x)
    assert_close(compiled(moe)(x, valid)[0], expected, FLOAT64)


def test_a_token_does_not_depend_on_the_others(x64):
    """Nothing is dropped however many tokens crowd one expert."""
    moe, x = make(4, experts_per_token=2), normal(1, 1, 3, D)
    crowd = jnp.concatenate([x, jnp.broadcast_to(x[:, :1], (1, 60, D))], 1)
    layer = compiled(lambda x: moe(x, jnp.ones(x.shape[:2], bool))[0])
    assert_close(layer(crowd)[:, :3], layer(x), FLOAT64)


def check_layout(layout: Layout, experts_TK: np.ndarray, num_experts: int, rows: int) -> int:
    """Asserts what `MoE.routed` relies on; returns the number of blocks in use."""
    slot_TK, copy_X = np.asarray(layout.copies.slot_RJ), np.asarray(layout.copies.copy_S)
    expert_x = np.asarray(layout.expert_x)
    copies = experts_TK.size
    assert len(expert_x) == num_blocks(copies, num_experts, rows)
    assert len(copy_X) == len(expert_x) * rows
    assert len(set(slot_TK.ravel())) == copies, "two copies in one slot"
    np.testing.assert_array_equal(copy_X[slot_TK.ravel()], np.arange(copies))
    assert (np.delete(copy_X, slot_TK.ravel()) == copies).all(), "an empty slot is not marked"
    np.testing.assert_array_equal(expert_x[slot_TK // rows], experts_TK)
    in_order = np.argsort(experts_TK.ravel(), kind="stable")
    assert (np.diff(slot_TK.ravel()[in_order]) > 0).all(), "not in order of expert, then of token"
    return len(set(slot_TK.ravel() // rows))


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_every_small_routing_is_laid_out_and_the_worst_fills_all_blocks(rows: int):
    """All 243 ways to send five copies to three experts."""
    every = np.stack(np.meshgrid(*[np.arange(3)] * 5), -1).reshape(-1, 5, 1)
    make_layouts = compiled(jax.vmap(partial(lay_out, num_experts=3, rows=rows)))
    layouts = jax.tree.map(np.asarray, make_layouts(jnp.asarray(every, jnp.int32)))
    used = [
        check_layout(jax.tree.map(itemgetter(i), layouts), routing, 3, rows)
        for i, routing in enumerate(every)
    ]
    assert max(used) == num_blocks(5, 3, rows)


def laid_out(experts_TK: np.ndarray, num_experts: int, rows: int) -> Layout:
    return _laid_out(jnp.asarray(experts_TK, jnp.int32), num_experts, rows)


_laid_out = compiled(lay_out, static_argnums=(1, 2))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.permutations(range(6)), min_size=200, max_size=200), st.integers(1, 6))
def test_any_routing_is_laid_out(orders: list, favoured: int):
    """400 copies, more than one chunk of the running count, to the first `favoured` experts."""
    experts_TK = np.array([[e % max(favoured, 2) for e in order[:2]] for order in orders])
    used = check_layout(laid_out(experts_TK, 6, 64), experts_TK, 6, 64)
    assert used <= num_blocks(400, 6, 64)


@pytest.mark.parametrize(("copies", "num_experts", "rows"), [(3, 8, 4), (8, 8, 4), (29, 8, 4)])
def test_the_bound_on_blocks_is_reached(copies: int, num_experts: int, rows: int):
    """Each expert in use begins a block for one copy; the others fill whole blocks of expert 0."""
    in_use = min(copies, num_experts)
    experts = np.concatenate([np.arange(in_use), np.zeros(copies - in_use, int)])[:, None]
    used = check_layout(laid_out(experts, num_experts, rows), experts, num_experts, rows)
    assert used == num_blocks(copies, num_experts, rows)
