"""MLA: both forms against a loop over heads and queries (report Eq. 1-11); what is cached."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.mla import MLA
from dsv3_jax.model.yarn import frequencies, rope_table, softmax_scale
from tests.shapes import TINY_YARN, compiled, normal, random_part, tiny_model
from tests.tolerances import BFLOAT16, FLOAT64, assert_close

B, T, CACHED = 2, 7, 3
# An epsilon that is felt, and that is not the one of the other norms.
VARIANTS = {
    "query latent": tiny_model(latent_rms_eps=0.1),
    "direct query": tiny_model(q_latent=None, latent_rms_eps=0.1),
    "query latent, YaRN": tiny_model(yarn=TINY_YARN),
    "direct query, YaRN": tiny_model(q_latent=None, yarn=TINY_YARN),
}
variants = pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)


def make(cfg: ModelConfig, dtype=jnp.float64) -> tuple[MLA, jax.Array, jax.Array]:
    """Random weights, inputs [B, T, D], and the table of positions 0..T-1."""
    mla = random_part(MLA, cfg, dtype)
    return (
        mla,
        normal(7, B, T, cfg.d_model, dtype=dtype),
        rope_table(cfg, jnp.arange(T)[None], dtype),
    )


def absorbed(mla: MLA, x: jax.Array, rope: jax.Array) -> jax.Array:
    """The absorbed form over a whole row, the first tokens of which are cached."""
    c_kv, k_rope = mla.latents(x, rope)
    seen_BTS = jnp.broadcast_to(jnp.tri(T, dtype=bool)[None, CACHED:], (B, T - CACHED, T))
    rest = mla.absorbed(
        x[:, CACHED:],
        rope[:, CACHED:],
        (c_kv[:, CACHED:], k_rope[:, CACHED:]),
        (c_kv[:, :CACHED], k_rope[:, :CACHED]),
        seen_BTS,
        mla.expansion(x.dtype),
    )
    none = c_kv[:, :0], k_rope[:, :0]
    own = c_kv[:, :CACHED], k_rope[:, :CACHED]
    first = mla.absorbed(
        x[:, :CACHED],
        rope[:, :CACHED],
        own,
        none,
        jnp.broadcast_to(jnp.tri(CACHED, dtype=bool)[None], (B, CACHED, CACHED)),
        mla.expansion(x.dtype),
    )
    return jnp.concatenate([first, rest], 1)


def norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean() + eps) * gain


def turn(x_R: np.ndarray, position: int, cfg: ModelConfig) -> np.ndarray:
    """RoPE of one vector by complex numbers."""
    turned = (x_R[0::2] + 1j * x_R[1::2]) * np.exp(1j * position * frequencies(cfg))
    return np.stack([turned.real, turned.imag], -1).reshape(-1)


def latents_by_loop(mla: MLA, x_TD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """c_kv and k_R of one row, position by position."""
    cfg, w = mla.cfg, np.asarray(mla.w_dkv_D_CR[...])
    gain, eps = np.asarray(mla.kv_norm_C[...]), cfg.latent_rms_eps
    c_kv = [norm(x @ w[:, : cfg.kv_latent], gain, eps) for x in x_TD]
    k_rope = [turn(x @ w[:, cfg.kv_latent :], t, cfg) for t, x in enumerate(x_TD)]
    return np.array(c_kv), np.array(k_rope)


def mla_by_loop(mla: MLA, x_TD: np.ndarray) -> np.ndarray:
    """Eq. 1-11 for one row, one head and one query at a time."""
    cfg = mla.cfg
    n, r, u = cfg.nope_dim, cfg.rope_dim, cfg.v_dim
    c_kv, k_rope = latents_by_loop(mla, x_TD)
    w_ukv, w_o = np.asarray(mla.w_ukv_C_HNU[...]), np.asarray(mla.w_o_HU_D[...])
    if cfg.q_latent is None:
        queries = x_TD @ np.asarray(mla.w_q_D_HNR[...])
    else:
        gain = np.asarray(mla.q_norm_Q[...])
        c_q = [norm(x @ np.asarray(mla.w_dq_DQ[...]), gain, cfg.latent_rms_eps) for x in x_TD]
        queries = np.array(c_q) @ np.asarray(mla.w_uq_Q_HNR[...])
    out = np.zeros_like(x_TD)
    for h in range(cfg.num_heads):
        q = queries[:, h * (n + r) : (h + 1) * (n + r)]
        kv = c_kv @ w_ukv[:, h * (n + u) : (h + 1) * (n + u)]
        for t in range(len(x_TD)):
            q_rope = turn(q[t, n:], t, cfg)
            scores = np.array([q[t, :n] @ kv[s, :n] + q_rope @ k_rope[s] for s in range(t + 1)])
            p = np.exp(scores * softmax_scale(cfg))
            out[t] += p / p.sum() @ kv[: t + 1, n:] @ w_o[h * u : (h + 1) * u]
    return out


@variants
def test_both_forms_equal_a_loop_over_heads_and_queries(x64, strict_dtypes, cfg: ModelConfig):
    mla, x, rope = make(cfg)
    assert cfg.yarn_active == (cfg.yarn is TINY_YARN)
    expected = np.stack([mla_by_loop(mla, row) for row in np.asarray(x)])
    forms = compiled(lambda x: (mla(x, rope), absorbed(mla, x, rope)))(x)
    assert_close(forms, (expected, expected), FLOAT64)


@pytest.mark.parametrize("name", ["query latent", "direct query, YaRN"])
def test_absorbed_equals_naive_in_value_and_in_every_gradient(x64, strict_dtypes, name: str):
    """Of the inputs and of every weight."""
    cfg = VARIANTS[name]
    mla, x, rope = make(cfg)
    do = normal(8, B, T, cfg.d_model)

    def value_and_gradients(form, mla, x):
        o, pull = jax.vjp(lambda mla, x: form(mla, x, rope), mla, x)
        return o, pull(do)

    expected = compiled(partial(value_and_gradients, MLA.__call__))(mla, x)
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(expected))
    assert_close(compiled(partial(value_and_gradients, absorbed))(mla, x), expected, FLOAT64)


def test_absorbed_equals_naive_in_bfloat16(strict_dtypes):
    mla, x, rope = make(tiny_model(), jnp.bfloat16)
    naive, latent = compiled(lambda x: (mla(x, rope), absorbed(mla, x, rope)))(x)
    assert naive.dtype == latent.dtype == jnp.bfloat16
    assert_close(latent, naive, BFLOAT16)


def test_cached_latents_are_normed_and_rotated_and_nothing_else(x64, strict_dtypes):
    cfg = tiny_model(yarn=TINY_YARN)
    mla, x, rope = make(cfg)
    c_kv, k_rope = compiled(mla.latents)(x, rope)
    assert c_kv.shape == (B, T, cfg.kv_latent)
    assert k_rope.shape == (B, T, cfg.rope_dim)
    expected = [latents_by_loop(mla, row) for row in np.asarray(x)]
    assert_close(c_kv, np.stack([c for c, _ in expected]), FLOAT64)
    assert_close(k_rope, np.stack([k for _, k in expected]), FLOAT64)


def test_decoding_step_by_step_equals_the_whole_row(x64, strict_dtypes):
    """One query at a time over a cache whose later slots hold garbage."""
    cfg = tiny_model()
    mla, x, rope = make(cfg)
    latents = compiled(mla.latents)(x, rope)
    garbage = [jnp.full_like(part, 1e3) for part in latents]

    @compiled
    def step(t):
        seen_S = jnp.arange(T) < t
        cached = [
            jnp.where(seen_S[None, :, None], a, b) for a, b in zip(latents, garbage, strict=True)
        ]
        x_B1D = jax.lax.dynamic_slice_in_dim(x, t, 1, 1)
        rope_1 = rope_table(cfg, t[None, None], x.dtype)
        seen_BTS = jnp.broadcast_to(jnp.append(seen_S, True)[None, None], (B, 1, T + 1))
        own = mla.latents(x_B1D, rope_1)
        return mla.absorbed(x_B1D, rope_1, own, cached, seen_BTS, mla.expansion(x.dtype))

    decoded = jnp.concatenate([step(jnp.asarray(t)) for t in range(T)], 1)
    assert_close(decoded, compiled(mla)(x, rope), FLOAT64)
