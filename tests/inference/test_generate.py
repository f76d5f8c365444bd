"""Decoding over the latent cache is the full forward pass, and sampling does what it says."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.cache import Cache, empty_cache
from dsv3_jax.inference.generate import decode, sample
from dsv3_jax.model.transformer import DeepSeekV3
from tests.shapes import TINY, TINY_YARN, compiled, random_model, random_tokens
from tests.tolerances import FLOAT64, assert_close

ROWS, LENGTH = 2, 24


def decoded(model: DeepSeekV3, tokens_BT: jax.Array) -> tuple[jax.Array, Cache]:
    """Logits [B, T, V] of one `decode` after another, and the cache after them all."""
    rows, length = tokens_BT.shape

    def step(cache, position):
        logits_BV, cache = decode(model, tokens_BT[:, position], position, cache)
        return cache, logits_BV

    cache = empty_cache(model.cfg, rows, length, model.embed_VD.dtype)
    cache, logits_TBV = lax.scan(step, cache, jnp.arange(length))
    return logits_TBV.swapaxes(0, 1), cache


@pytest.mark.parametrize(
    "cfg",
    [
        replace(TINY, yarn=TINY_YARN),
        replace(TINY, num_dense_layers=0, q_latent=None, tied_head=True),
        replace(TINY, num_dense_layers=3, mtp_depth=0),
    ],
    ids=["yarn", "only-moe", "only-dense"],
)
def test_decoding_gives_the_logits_of_the_full_forward_pass_at_every_position(
    x64: None, cfg: ModelConfig
):
    model = random_model(cfg, jnp.float64)
    tokens_BT = random_tokens(cfg, ROWS, LENGTH)
    logits_BTV, cache = compiled(decoded)(model, tokens_BT)
    assert_close(logits_BTV, compiled(model)(tokens_BT), FLOAT64)
    # Nothing is kept but C + R values per token and layer, and all of them were written.
    assert sum(leaf.size for leaf in jax.tree.leaves(cache)) == (
        cfg.num_layers * ROWS * LENGTH * (cfg.kv_latent + cfg.rope_dim)
    )
    assert cache.c_kv_LBSC.shape == (cfg.num_layers, ROWS, LENGTH, cfg.kv_latent)
    assert cache.k_rope_LBSR.shape == (cfg.num_layers, ROWS, LENGTH, cfg.rope_dim)
    assert all((np.abs(leaf).max(-1) > 0).all() for leaf in cache)


def test_the_cache_holds_the_normed_latent_and_the_rotated_key(x64: None):
    """Of the first layer, whose input is the embedding."""
    model = random_model(TINY, jnp.float64)
    tokens_BT = random_tokens(TINY, ROWS, LENGTH)
    _, cache = compiled(decoded)(model, tokens_BT)
    mla = jax.tree.map(lambda x: np.asarray(x[0]), model.dense_layers.mla)
    x_BTD = np.asarray(model.embed_VD[...])[tokens_BT]
    x_BTD = unit_rms(x_BTD) * np.asarray(model.dense_layers.attention_norm_D[...][0])
    c_kv_BTC, k_BTR = np.split(x_BTD @ mla.w_dkv_D_CR[...], [TINY.kv_latent], axis=-1)
    assert_close(cache.c_kv_LBSC[0], unit_rms(c_kv_BTC) * mla.kv_norm_C[...], FLOAT64)
    angle_TP = np.arange(LENGTH)[:, None] * 1e4 ** -(np.arange(0, TINY.rope_dim, 2) / TINY.rope_dim)
    turned_BTP = (k_BTR[..., ::2] + 1j * k_BTR[..., 1::2]) * np.exp(1j * angle_TP)
    k_rope_BSR = np.asarray(cache.k_rope_LBSR[0])
    assert_close(k_rope_BSR[..., ::2], turned_BTP.real, FLOAT64)
    assert_close(k_rope_BSR[..., 1::2], turned_BTP.imag, FLOAT64)


def unit_rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + TINY.rms_eps)


# --- sampling ---

PROMPT, NEW = 5, 7


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    return random_model(TINY)


@pytest.fixture(scope="module")
def text(model: DeepSeekV3) -> Callable[..., np.ndarray]:
    """`text(prompt_BT, heat, seed=0, num_tokens=NEW)`: what `sample` continues a prompt with."""
    run = compiled(sample, static_argnums=3)

    def text(prompt_BT: jax.Array, heat: float, seed: int = 0, num_tokens: int = NEW) -> np.ndarray:
        key = jax.random.key(seed)
        return np.asarray(run(model, prompt_BT, key, num_tokens, jnp.float32(heat)))

    return text


def test_temperature_0_takes_the_likeliest_token_of_the_full_forward_pass_each_time(model, text):
    prompt_BT = random_tokens(TINY, ROWS, PROMPT)
    found_BT = text(prompt_BT, 0)
    assert found_BT.shape == (ROWS, NEW)
    assert found_BT.dtype == np.int32
    forward = compiled(model)
    tokens_BT = jnp.pad(prompt_BT, ((0, 0), (0, NEW)))  # what comes later changes nothing before it
    for at in range(PROMPT, PROMPT + NEW):
        logits_BV = np.asarray(forward(tokens_BT)[:, at - 1])
        ranked_BV = np.sort(logits_BV)
        assert (ranked_BV[:, -1] - ranked_BV[:, -2] > 1e-3).all(), "nearly a tie: take another seed"
        tokens_BT = tokens_BT.at[:, at].set(logits_BV.argmax(-1))
    assert np.array_equal(found_BT, tokens_BT[:, PROMPT:])
    assert np.array_equal(found_BT, text(prompt_BT, 0, seed=1))  # no chance in it


def test_rows_of_a_batch_do_not_see_one_another(text):
    prompt_BT = random_tokens(TINY, ROWS, PROMPT)
    other_BT = prompt_BT.at[1].set(random_tokens(TINY, 1, PROMPT, seed=9)[0])
    assert np.array_equal(text(prompt_BT, 0)[0], text(other_BT, 0)[0])
    assert not np.array_equal(text(prompt_BT, 0)[1], text(other_BT, 0)[1])


def test_a_key_and_a_temperature_decide_the_text(text):
    prompt_BT = random_tokens(TINY, ROWS, PROMPT)
    warm = text(prompt_BT, 1.0)
    assert np.array_equal(warm, text(prompt_BT, 1.0))
    assert not np.array_equal(warm, text(prompt_BT, 1.0, seed=1))
    assert not np.array_equal(warm, text(prompt_BT, 0))
    twice = text(jnp.broadcast_to(prompt_BT[:1], prompt_BT.shape), 1.0)
    assert not np.array_equal(twice[0], twice[1])  # each row has its own luck
    hot = text(prompt_BT, 1e6)  # all tokens alike: what differs along a row is luck alone
    assert len(np.unique(hot)) > NEW


def test_samples_follow_the_softmax_of_the_logits_over_the_temperature(model, text):
    """Second tokens of many rows with one first token: a chi-squared test with a fixed key."""
    rows, heat = 2000, 2.0
    prompt_BT = random_tokens(TINY, 1, 1)
    many_BT = jnp.broadcast_to(prompt_BT, (rows, 1))
    drawn_B = text(many_BT, heat, 3, num_tokens=1)[:, 0]
    logits_V = np.asarray(compiled(model)(prompt_BT)[0, 0], np.float64)
    p_V = np.exp((logits_V - logits_V.max()) / heat)
    expected_V = rows * p_V / p_V.sum()
    counted_V = np.bincount(drawn_B, minlength=TINY.vocab_size)
    often_V = expected_V >= 5
    error = ((counted_V - expected_V)[often_V] ** 2 / expected_V[often_V]).sum()
    freedom = often_V.sum()
    assert freedom > 10
    assert error < freedom + 5 * np.sqrt(2 * freedom)  # five standard deviations
    assert (text(many_BT, 0, num_tokens=1) == logits_V.argmax()).all()
