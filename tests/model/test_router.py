"""The router against loops over tokens (report 2.1.2): choice, gates, balance loss, bias."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.router import (
    Router,
    Routing,
    balance_loss,
    choose_experts,
    max_violation,
    updated_bias,
)
from tests.jaxprs import equations
from tests.shapes import compiled, normal, random_part, tiny_model
from tests.tolerances import FLOAT64, assert_close

B, T = 2, 50
CFG = tiny_model()
E, K = CFG.num_experts, CFG.experts_per_token
ALL = np.ones((B, T), bool)


def make(cfg: ModelConfig = CFG, bias=None, w=None, dtype=jnp.float64) -> Router:
    """A router with random weights; biases 0.3 N(0, 1) unless given, so that they decide often."""
    router = random_part(Router, cfg, dtype)
    router.bias_E = router.bias_E.replace(
        0.3 * normal(5, cfg.num_experts) if bias is None else bias
    )
    if w is not None:
        router.w_DE = router.w_DE.replace(w)
    return router


def best(values: np.ndarray, count: int) -> list[int]:
    """Indices of the largest values in descending order, the lower index first among equals."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def chosen_by_loop(biased_E: np.ndarray, cfg: ModelConfig) -> list[int]:
    """Steps 3 and 4 of the routing of one token."""
    size = cfg.num_experts // cfg.num_groups
    groups = biased_E.reshape(cfg.num_groups, size)
    group_scores = np.array([sum(sorted(group)[-2:]) for group in groups])
    kept = best(group_scores, cfg.num_kept_groups)
    masked = [
        score if i // size in kept else float(cfg.masked_score) for i, score in enumerate(biased_E)
    ]
    return best(masked, cfg.experts_per_token)


def routed_by_loop(router: Router, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, expert ids and gates, token by token."""
    cfg, w, bias = router.cfg, np.asarray(router.w_DE[...]), np.asarray(router.bias_E[...])
    s = 1 / (1 + np.exp(-(x @ w)))
    ids = np.zeros((*x.shape[:2], cfg.experts_per_token), int)
    gates = np.zeros(ids.shape)
    for b, t in np.ndindex(x.shape[:2]):
        ids[b, t] = chosen_by_loop(s[b, t] + bias, cfg)
        gates[b, t] = s[b, t, ids[b, t]] / s[b, t, ids[b, t]].sum() * cfg.gate_scale
    return s, ids, gates


def balance_by_loop(s, counted, valid, k: int) -> float:
    """Eq. 17-20 without alpha over valid tokens; `counted[b][t]` lists the experts f counts."""
    total, num_experts = 0.0, s.shape[-1]
    for b in range(len(s)):
        tokens = [t for t in range(s.shape[1]) if valid[b, t]]
        for i in range(num_experts):
            if tokens:
                f = sum(i in counted[b][t] for t in tokens) * num_experts / (k * len(tokens))
                p = sum(s[b, t, i] / s[b, t].sum() for t in tokens) / len(tokens)
                total += f * p
    return total / len(s)


@pytest.mark.parametrize(
    ("groups", "kept", "mask"),
    [(4, 2, "-inf"), (4, 2, "0"), (2, 1, "-inf"), (4, 4, "-inf"), (1, 1, "0")],
)
def test_routing_equals_a_loop_over_tokens(x64, strict_dtypes, groups: int, kept: int, mask: str):
    """With biased scores that are mostly positive, and with mostly negative ones."""
    cfg = replace(CFG, masked_score=mask, num_groups=groups, num_kept_groups=kept)
    x, route = normal(0, B, T, CFG.d_model), compiled(lambda router, x: router(x, ALL))
    for offset in (0.0, -0.9):
        router = make(cfg, bias=0.3 * normal(5, E) + offset)
        routing, stats = route(router, x)
        _, ids, gates = routed_by_loop(router, np.asarray(x))
        np.testing.assert_array_equal(routing.experts_BTK, ids)
        assert_close(routing.gates_BTK, gates, FLOAT64)
        np.testing.assert_array_equal(stats.load_E, np.bincount(ids.ravel(), minlength=E))
        if mask == "-inf":
            assert all(len(set(t // (E // groups))) <= kept for t in ids.reshape(-1, K))


def test_mask_values_differ_only_where_a_kept_score_is_not_positive():
    low = -np.arange(1.0, E + 1)  # group 0 is best, then group 1
    scores = jnp.asarray([[low, low + 3.5]])  # all negative; the chosen two positive

    def choose(mask: str) -> list:
        cfg = replace(CFG, masked_score=mask)
        return compiled(partial(choose_experts, cfg=cfg))(scores)[0].tolist()

    assert choose("-inf") == [[0, 1], [0, 1]]
    assert choose("0") == [[4, 5], [0, 1]]  # the first of the dropped groups


def test_choices_among_equals_follow_the_lower_index():
    cases = np.random.default_rng(0).integers(0, 3, (1, 200, E)).astype(np.float32)
    expected = [chosen_by_loop(case, CFG) for case in cases[0]]
    np.testing.assert_array_equal(compiled(partial(choose_experts, cfg=CFG))(cases)[0], expected)


def test_gates_sum_to_the_scale_and_come_from_unbiased_scores(x64):
    """A bias changes choices and never the gates of a choice; one common to all does nothing."""
    x = normal(0, B, T, CFG.d_model)
    route = compiled(lambda bias: make(bias=bias)(x, ALL)[0])
    unbiased, biased, common = (
        Routing(*map(np.asarray, route(bias)))
        for bias in (jnp.zeros(E), 0.3 * normal(5, E), jnp.full(E, 0.25))
    )
    for routing in (unbiased, biased):
        np.testing.assert_allclose(routing.gates_BTK.sum(-1), CFG.gate_scale, rtol=1e-12)
    same = (biased.experts_BTK == unbiased.experts_BTK).all(-1)
    assert 0 < same.sum() < same.size
    np.testing.assert_array_equal(biased.gates_BTK[same], unbiased.gates_BTK[same])
    jax.tree.map(np.testing.assert_array_equal, common, unbiased)


def test_gradient_reaches_scores_through_gates_and_not_through_bias_or_choice(x64):
    """As if the chosen experts were constants."""
    router, x, weight = make(), normal(0, B, T, CFG.d_model), normal(1, B, T, K)

    def gated(x, w, bias):
        routing, _ = make(bias=bias, w=w)(x, ALL)
        return (routing.gates_BTK * weight).sum()

    def fixed(x, w, ids):
        s = jnp.take_along_axis(jax.nn.sigmoid(x @ w), ids, -1)
        return (s / s.sum(-1, keepdims=True) * CFG.gate_scale * weight).sum()

    w, bias = router.w_DE[...], router.bias_E[...]
    ids = compiled(router)(x, ALL)[0].experts_BTK
    dx, dw, dbias = compiled(jax.grad(gated, (0, 1, 2)))(x, w, bias)
    np.testing.assert_array_equal(dbias, np.zeros(E))
    assert_close((dx, dw), compiled(jax.grad(fixed, (0, 1)))(x, w, ids), FLOAT64)


@pytest.mark.parametrize("indicator", ["scores", "routed"])
def test_balance_loss_and_load_equal_a_loop_over_valid_tokens(x64, strict_dtypes, indicator):
    """Row 1 ends in tokens that do not count, row 2 has none that does."""
    router, x = make(replace(CFG, balance_indicator=indicator)), normal(0, 3, T, CFG.d_model)
    valid = np.ones((3, T), bool)
    valid[1, 30:] = valid[2] = False
    s, ids, _ = routed_by_loop(router, np.asarray(x))
    plain = [[best(token, K) for token in row] for row in s]
    assert (np.sort(plain) != np.sort(ids)).any()  # the indicators differ here
    _, stats = compiled(router)(x, jnp.asarray(valid))
    expected = balance_by_loop(s, plain if indicator == "scores" else ids, valid, K)
    assert_close(stats.balance, np.float64(expected), FLOAT64)
    np.testing.assert_array_equal(stats.load_E, np.bincount(ids[valid].ravel(), minlength=E))


def test_tokens_that_do_not_count_leave_no_trace_in_the_statistics():
    router, x = random_part(Router, CFG), normal(0, B, T, CFG.d_model)
    valid = jnp.arange(T)[None] < jnp.array([[T], [20]])
    statistics = compiled(lambda x: router(x, valid)[1])
    other = jnp.where(valid[..., None], x, 10 * x[::-1])
    for a, b in zip(statistics(x), statistics(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_balance_loss_is_one_under_uniform_load(x64):
    """Token t scores experts t and t + 1 highest, so every expert is chosen equally often."""
    cfg = replace(CFG, num_groups=1, num_kept_groups=1, d_model=E)
    router = make(cfg, bias=jnp.zeros(E), w=4 * jnp.eye(E))
    turns = np.array([np.roll([1.0, 0.8] + [-1.0] * (E - 2), t) for t in range(2 * E)])
    uniform = jnp.asarray(np.stack([turns, turns[::-1]]))
    valid = jnp.ones(uniform.shape[:2], bool)
    route = compiled(router)
    _, stats = route(uniform, valid)
    np.testing.assert_array_equal(stats.load_E, np.full(E, 2 * 2 * E * K / E))
    np.testing.assert_allclose(stats.balance, 1, rtol=1e-12)
    skewed = jnp.broadcast_to(uniform[:, :1], uniform.shape)
    assert route(skewed, valid)[1].balance > 2


def test_balance_gradient_flows_through_the_probabilities_alone(x64):
    router, x = make(), normal(0, B, T, CFG.d_model)
    w = router.w_DE[...]
    s = 1 / (1 + np.exp(-(np.asarray(x) @ np.asarray(w))))
    ranks = np.argsort(np.argsort(-s))
    f_BE = jnp.asarray((ranks < K).sum(1) * E / (K * T))

    def constant_f(w):
        s = jax.nn.sigmoid(x @ w)
        return (f_BE * (s / s.sum(-1, keepdims=True)).mean(1)).sum(-1).mean()

    actual = compiled(jax.grad(lambda w: make(w=w)(x, ALL)[1].balance))(w)
    assert_close(actual, compiled(jax.grad(constant_f))(w), FLOAT64)
    assert np.abs(actual).max() > 1e-6


def test_balance_loss_of_uniform_scores_is_one_under_any_load():
    s, counted = np.full((1, T, E), 0.5, np.float32), np.zeros((1, T, E), bool)
    counted[..., :K] = True
    balance = compiled(partial(balance_loss, experts_per_token=K))
    np.testing.assert_allclose(balance(s, counted, np.ones((1, T), bool)), 1, rtol=1e-6)


def test_logits_are_computed_in_full_precision_on_every_device():
    """By default a TPU rounds the operands of a float32 product to bfloat16, a GPU to TF32."""
    router, x = random_part(Router, CFG), normal(0, B, T, CFG.d_model)
    traced = equations(lambda x: router(x, ALL)[0], x)
    dots = [e for e in traced if "dot" in e.primitive.name]
    assert [dot.params["precision"] for dot in dots] == [(jax.lax.Precision.HIGHEST,) * 2]


def test_routing_of_bfloat16_inputs_is_computed_in_float32(strict_dtypes):
    """Bit for bit what the float32 router makes of the same numbers."""
    router = random_part(Router, CFG, jnp.float32)
    x = normal(0, B, T, CFG.d_model, dtype=jnp.bfloat16)
    route = compiled(router)
    narrow, wide = route(x, ALL), route(x.astype(jnp.float32), ALL)
    assert narrow[0].gates_BTK.dtype == narrow[1].balance.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, narrow, wide)


def test_the_bias_moves_against_the_load(x64):
    bias, load = jnp.array([[0.5, 0, 0, -1], [0, 0, 0, 0]]), jnp.array([[9, 1, 5, 5], [2, 2, 2, 2]])
    moved = updated_bias(bias, load, 0.25)
    np.testing.assert_array_equal(moved, [[0.25, 0.25, 0, -1], [0, 0, 0, 0]])
    np.testing.assert_array_equal(updated_bias(bias, load, 0.0), bias)


def test_the_bias_evens_out_a_skewed_load():
    """From two favourites to a busiest expert with less than 1.3 times the mean load."""
    cfg = replace(CFG, num_groups=1, num_kept_groups=1, d_model=E)
    popular = jnp.array([1.0, 1.0] + [0.0] * (E - 2))
    x = 0.5 * normal(0, 8, 64, E) + popular[None, None]

    @compiled
    def load(bias):
        router = make(cfg, bias, jnp.eye(E), jnp.float32)
        return router(x, jnp.ones(x.shape[:2], bool))[1].load_E

    bias = jnp.zeros(E)
    before = max_violation(load(bias))
    for _ in range(40):
        bias = updated_bias(bias, load(bias), 0.01)
    assert before > 1
    assert max_violation(load(bias)) < 0.3


def test_max_violation_is_the_excess_of_the_busiest_expert(strict_dtypes):
    load = jnp.array([[4, 4, 4, 4], [8, 0, 4, 4], [16, 0, 0, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(max_violation(load), [0, 1, 3, 3])
