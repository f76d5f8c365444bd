"""MTP modules: the released order of their two inputs, the chain of depths, which tokens they may see (report 2.2)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.mtp import MTP, shift_left
from dsv3_jax.model.yarn import rope_table
from tests.shapes import compiled, normal, random_model, random_part, random_tokens, tiny_model
from tests.tolerances import FLOAT64, assert_close

B, T = 2, 6
CFG = tiny_model(num_layers=1, num_dense_layers=1, mtp_depth=2)


@pytest.mark.parametrize("places", [0, 1, 3, 6])
def test_shift_left_moves_rows_and_fills_their_end(places: int):
    x = np.arange(12).reshape(2, 6)
    expected = [[*row[places:], *[-1] * places] for row in x.tolist()]
    np.testing.assert_array_equal(shift_left(jnp.asarray(x), places, fill=-1), expected)


def test_a_module_projects_embedding_then_hidden_state(x64, strict_dtypes):
    """The order of the released weights, reversed against Eq. 21; then one MoE layer and its own norm."""
    mtp = random_part(MTP, CFG, jnp.float64)
    h, embedded = normal(0, B, T, CFG.d_model), normal(1, B, T, CFG.d_model)
    rope, valid = rope_table(CFG, jnp.arange(T), h.dtype), jnp.ones((B, T), bool)

    def expected(h, embedded):
        w_embed, w_hidden = jnp.split(mtp.w_proj_DD_D[...], 2)
        x = rms_norm(embedded, mtp.embed_norm_D[...], CFG.rms_eps) @ w_embed
        x += rms_norm(h, mtp.hidden_norm_D[...], CFG.rms_eps) @ w_hidden
        x, stats = mtp.block(x, rope, valid)
        return rms_norm(x, mtp.norm_D[...], CFG.rms_eps), stats

    actual = compiled(lambda h, e: mtp(h, e, rope, valid))(h, embedded)
    assert_close(actual, compiled(expected)(h, embedded), FLOAT64)


def test_depth_k_continues_depth_k_minus_1_with_token_i_plus_k(x64, strict_dtypes):
    """And counts the load of the T - k positions whose token exists and counts."""
    model, tokens = random_model(CFG, jnp.float64), random_tokens(CFG, B, T)
    h, valid = normal(0, B, T, CFG.d_model), jnp.ones((B, T), bool).at[1, 4].set(False)
    rope = rope_table(CFG, jnp.arange(T), h.dtype)
    outputs = compiled(lambda h: model.mtp_hidden(h, tokens, valid))(h)
    for k, (module, (actual, stats)) in enumerate(zip(model.mtp, outputs, strict=True), start=1):
        ahead = np.pad(np.asarray(tokens)[:, k:], ((0, 0), (0, k)))
        counted = np.asarray(valid) & np.pad(np.asarray(valid)[:, k:], ((0, 0), (0, k)))
        embedded = model.embed_VD[...][ahead]
        step = compiled(lambda h, e, m=module, v=jnp.asarray(counted): m(h, e, rope, v))
        expected, expected_stats = step(h, embedded)
        assert_close(actual[:, : T - k], expected[:, : T - k], FLOAT64)
        assert_close(stats, expected_stats, FLOAT64)
        assert stats.load_E.sum() == counted.sum() * CFG.experts_per_token
        h = actual


def test_depth_k_sees_k_tokens_ahead_and_no_more(x64):
    """By the gradient of its hidden states with respect to each position's embedding; every token differs."""
    model, tokens = random_model(CFG, jnp.float64), jnp.arange(T)[None]
    weight = normal(3, CFG.d_model)

    def run(embed_VD):
        varied = jax.tree.map(lambda x: x, model)  # a copy of this trace
        varied.embed_VD = varied.embed_VD.replace(embed_VD)
        h, _ = varied.hidden(tokens)
        return jnp.stack([h_k[0] @ weight for h_k, _ in varied.mtp_hidden(h, tokens)])

    jacobian_KTVD = np.asarray(compiled(jax.jacrev(run))(model.embed_VD[...]))
    reach_KTS = np.abs(jacobian_KTVD[:, :, :T]).max(-1) > 0
    for k in (1, 2):
        np.testing.assert_array_equal(reach_KTS[k - 1, : T - k], np.tri(T, T, k, bool)[: T - k])
