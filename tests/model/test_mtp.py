"""MTP modules: order of their inputs, chain of depths, tokens they see (report 2.2)."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.mtp import shift_left
from dsv3_jax.model.yarn import rope_table
from tests.shapes import compiled, normal, random_model, random_tokens, tiny_model
from tests.tolerances import FLOAT64, assert_close

B, T = 2, 6
CFG = tiny_model(num_layers=1, num_dense_layers=1, mtp_depth=2)

run_module = compiled(lambda module, *args: module(*args))
run_depths = compiled(lambda model, *args: model.mtp_hidden(*args))


@pytest.mark.parametrize("places", [0, 1, 3, 6])
def test_shift_left_moves_rows_and_fills_their_end(places: int):
    x = np.arange(12).reshape(2, 6)
    expected = [[*row[places:], *[-1] * places] for row in x.tolist()]
    np.testing.assert_array_equal(shift_left(jnp.asarray(x), places, fill=-1), expected)


def test_a_module_projects_embedding_then_hidden_state(x64, strict_dtypes):
    """The order of the released weights, not Eq. 21's; then one MoE layer and its own norm."""
    module = random_model(CFG, jnp.float64).mtp[0]
    h, embedded = normal(0, B, T, CFG.d_model), normal(1, B, T, CFG.d_model)
    rope, valid = rope_table(CFG, jnp.arange(T)[None], h.dtype), jnp.ones((B, T), bool)

    def expected(h, embedded):
        w_embed, w_hidden = jnp.split(module.w_proj_DD_D[...], 2)
        x = rms_norm(embedded, module.embed_norm_D[...], CFG.rms_eps) @ w_embed
        x += rms_norm(h, module.hidden_norm_D[...], CFG.rms_eps) @ w_hidden
        x, stats = module.block(x, rope, valid)
        return rms_norm(x, module.norm_D[...], CFG.rms_eps), stats

    actual = run_module(module, h, embedded, rope, valid)
    assert_close(actual, compiled(expected)(h, embedded), FLOAT64)


def test_depth_k_continues_depth_k_minus_1_with_token_i_plus_k(x64, strict_dtypes):
    """And counts the load of the T - k positions whose token exists and counts."""
    model, tokens = random_model(CFG, jnp.float64), random_tokens(CFG, B, T)
    h, valid = normal(0, B, T, CFG.d_model), np.ones((B, T), bool)
    valid[1, 4] = False
    rope, table = rope_table(CFG, jnp.arange(T)[None], h.dtype), np.asarray(model.embed_VD[...])
    outputs = run_depths(model, h, tokens, jnp.asarray(valid))
    for k, (module, (actual, stats)) in enumerate(zip(model.mtp, outputs, strict=True), start=1):
        ahead = np.pad(np.asarray(tokens)[:, k:], ((0, 0), (0, k)))
        counted = valid & np.pad(valid[:, k:], ((0, 0), (0, k)))
        expected, expected_stats = run_module(module, h, table[ahead], rope, counted)
        assert_close(actual[:, : T - k], expected[:, : T - k], FLOAT64)
        assert_close(stats, expected_stats, FLOAT64)
        assert stats.load_E.sum() == counted.sum() * CFG.experts_per_token
        h = actual


def test_depth_k_sees_k_tokens_ahead_and_no_more(x64, strict_dtypes):
    """Changing token s >= 1 changes depth k exactly at positions s - k and later.

    Token 0 is read by the main model alone, whose hidden states are given here.
    """
    model, tokens = random_model(CFG, jnp.float64), np.asarray(random_tokens(CFG, B, T))
    h, valid = normal(0, B, T, CFG.d_model), jnp.ones((B, T), bool)

    def states(tokens: np.ndarray) -> list[np.ndarray]:
        return [np.asarray(h_k) for h_k, _ in run_depths(model, h, tokens, valid)]

    before = states(tokens)
    for s in range(T):
        other = tokens.copy()
        other[0, s] = (other[0, s] + 1) % CFG.vocab_size
        for k, (old, new) in enumerate(zip(before, states(other), strict=True), start=1):
            reached = [1 <= s <= i + k for i in range(T - k)]
            np.testing.assert_array_equal((old != new).any(-1)[0, : T - k], reached)
            np.testing.assert_array_equal(old[1], new[1])
