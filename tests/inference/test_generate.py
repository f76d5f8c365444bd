"""Decoding over the latent cache is the full forward pass, whatever the lengths."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig, YarnConfig
from dsv3_jax.inference import cache as cache_module
from dsv3_jax.inference import generate
from dsv3_jax.inference.cache import Cache, extended, lengthened, slots
from dsv3_jax.inference.generate import State, continued, decode, prefill
from dsv3_jax.inference.sampling import sampling
from dsv3_jax.inference.weights import Weights, lay_out
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.quant.fp8 import Blocked
from tests.checkpoint.hf_folders import load, random_tensors, write_folder
from tests.shapes import TINY, TINY_YARN, compiled, random_model, random_tokens
from tests.tolerances import BFLOAT16, FLOAT64, assert_close

ROWS, LENGTH = 2, 24
TWO = replace(TINY, num_layers=2)  # one dense, one MoE


def read_and_decoded(
    model: DeepSeekV3, tokens_BT: jax.Array, filled: int, read: int
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Logits [B, T - read + 1, V] after each token from the `read`-th on, and the cache after all.

    A prompt of `read` tokens filled up to `filled`, then one token at a time.
    """
    weights = lay_out(model)

    @compiled
    def run(weights, tokens_BT):
        prompt_BT = jnp.pad(tokens_BT[:, :read], ((0, 0), (0, filled - read)))
        logits_BV, cache = prefill(weights, prompt_BT, jnp.asarray(read))

        def step(cache, position):
            logits_BV, own = decode(weights, tokens_BT[:, position], position, cache)
            return extended(cache, own, position), logits_BV

        positions = jnp.arange(read, tokens_BT.shape[1])
        cache, logits_TBV = jax.lax.scan(step, lengthened(cache, tokens_BT.shape[1]), positions)
        return jnp.concatenate([logits_BV[None], logits_TBV]).swapaxes(0, 1), cache

    return run(weights, tokens_BT)


@pytest.mark.parametrize(
    ("cfg", "filled", "read"),
    [
        (replace(TINY, yarn=TINY_YARN), 16, 11),
        (replace(TINY, num_dense_layers=0, q_latent=None, tied_head=True), 1, 1),
        (replace(TINY, num_dense_layers=3, mtp_depth=0), 8, 8),
    ],
    ids=["yarn", "only-moe", "only-dense"],
)
def test_decoding_gives_the_logits_of_the_full_forward_pass_at_every_position(
    x64: None, cfg: ModelConfig, filled: int, read: int
):
    model = random_model(cfg, jnp.float64)
    tokens_BT = random_tokens(cfg, ROWS, LENGTH)
    logits_BTV, cache = read_and_decoded(model, tokens_BT, filled, read)
    assert_close(logits_BTV, compiled(model)(tokens_BT)[:, read - 1 :], FLOAT64)
    # Nothing is kept but C + R values per token and layer, and all of them were written.
    assert sum(leaf.size for leaf in jax.tree.leaves(cache)) == (
        cfg.num_layers * ROWS * LENGTH * (cfg.kv_latent + cfg.rope_dim)
    )
    assert len(cache) == cfg.num_layers
    for c_kv_BSC, k_rope_BSR in cache:
        assert c_kv_BSC.shape == (ROWS, LENGTH, cfg.kv_latent)
        assert k_rope_BSR.shape == (ROWS, LENGTH, cfg.rope_dim)
    assert all((np.abs(leaf).max(-1) > 0).all() for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize("read", [1, 24])
def test_the_cache_holds_the_normed_latent_and_the_rotated_key(x64: None, read: int):
    """Of the first layer, whose input is the embedding; decoded, and read as a prompt."""
    model = random_model(TINY, jnp.float64)
    tokens_BT = random_tokens(TINY, ROWS, LENGTH)
    _, cache = read_and_decoded(model, tokens_BT, read, read)
    mla = jax.tree.map(lambda x: np.asarray(x[0]), model.dense_layers.mla)
    x_BTD = np.asarray(model.embed_VD[...])[tokens_BT]
    x_BTD = unit_rms(x_BTD) * np.asarray(model.dense_layers.attention_norm_D[...][0])
    c_kv_BTC, k_BTR = np.split(x_BTD @ mla.w_dkv_D_CR[...], [TINY.kv_latent], axis=-1)
    assert_close(cache[0].c_kv_BSC, unit_rms(c_kv_BTC) * mla.kv_norm_C[...], FLOAT64)
    angle_TP = np.arange(LENGTH)[:, None] * 1e4 ** -(np.arange(0, TINY.rope_dim, 2) / TINY.rope_dim)
    turned_BTP = (k_BTR[..., ::2] + 1j * k_BTR[..., 1::2]) * np.exp(1j * angle_TP)
    k_rope_BSR = np.asarray(cache[0].k_rope_BSR)
    assert_close(k_rope_BSR[..., ::2], turned_BTP.real, FLOAT64)
    assert_close(k_rope_BSR[..., 1::2], turned_BTP.imag, FLOAT64)


def unit_rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + TINY.rms_eps)


# --- texts ---

NEW = 8


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of 8, 16, 32 slots and prompts filled up to 4, 8, 16 tokens."""
    monkeypatch.setattr(cache_module, "SHORTEST", 8)
    monkeypatch.setattr(generate, "SHORTEST_PROMPT", 4)


def text(weights: Weights, prompt_BT: np.ndarray, new: int, **how: float) -> np.ndarray:
    """int32 [B, new] that continues a prompt."""
    how = sampling(**({"seed": 0} | how))
    return np.stack([*continued(weights, np.asarray(prompt_BT), new, how)], 1)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return lay_out(random_model(TWO))


def test_a_consumed_model_gives_up_each_variable_as_it_is_laid_out(weights: Weights):
    model = random_model(TWO)
    stacks = jax.tree.leaves((model.dense_layers, model.moe_layers))
    laid_out = lay_out(model, consume=True)
    assert all(x.is_deleted() for x in stacks)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, laid_out, weights)))


@pytest.mark.parametrize(
    ("dtype", "changes", "tolerance"),
    [(jnp.float32, {}, 1e-4), (jnp.bfloat16, {"q_latent": None}, 4 * BFLOAT16)],
    ids=["float32", "bfloat16, direct query"],
)
def test_greedy_text_is_that_of_full_forward_passes_whatever_the_lengths(
    dtype: jnp.dtype, changes: dict, tolerance: float
):
    """Prompts on both sides of a bucket's edge; a cache that grows on the way.

    Each token is the likeliest of the full forward pass over the text before it, wherever that is
    clear: by more than the tolerance, of the largest logit.
    """
    model = random_model(replace(TWO, **changes), dtype)
    weights, forward, clear = lay_out(model), compiled(model), []
    for length in (4, 5):
        prompt_BT = np.asarray(random_tokens(TINY, ROWS, length, seed=length))
        found_BT = text(weights, prompt_BT, NEW)
        assert found_BT.shape == (ROWS, NEW)
        assert found_BT.dtype == np.int32
        whole_BT = np.zeros((ROWS, 5 + NEW), np.int32)  # of one length: one program for all
        whole_BT[:, : length + NEW] = np.concatenate([prompt_BT, found_BT], 1)
        logits_BTV = np.asarray(forward(whole_BT), np.float32)[:, length - 1 : length + NEW - 1]
        ranked_BTV = np.sort(logits_BTV)
        margin_BT = ranked_BTV[..., -1] - ranked_BTV[..., -2]
        clear.append(margin_BT > tolerance * np.abs(logits_BTV).max())
        assert np.array_equal(found_BT[clear[-1]], logits_BTV.argmax(-1)[clear[-1]])
    assert np.mean(clear) > 0.4


@pytest.mark.slow
def test_greedy_text_in_float64_is_that_of_full_forward_passes_to_the_last_id(x64: None):
    """Where nothing is unclear."""
    model = random_model(TWO, jnp.float64)
    forward, prompt_BT = compiled(model), np.asarray(random_tokens(TINY, ROWS, 5))
    found_BT = text(lay_out(model), prompt_BT, NEW)
    whole_BT = np.concatenate([prompt_BT, found_BT], 1)
    expected_BT = np.asarray(forward(whole_BT))[:, 4:-1].argmax(-1)
    assert np.array_equal(found_BT, expected_BT)


def test_a_cache_has_room_for_the_text_and_not_for_twice_as_much():
    assert [slots(n, 50) for n in (1, 8, 9, 16, 17, 32, 33, 50)] == [8, 8, 16, 16, 32, 32, 50, 50]


def test_text_comes_in_calls_of_many_steps_and_is_the_same(weights, monkeypatch):
    prompt_BT = random_tokens(TINY, ROWS, 3)
    counts, go_on = [], generate._go_on

    class Counted:
        lower = go_on.lower

        def __call__(self, weights, state, count, how):
            counts.append(int(count))
            return go_on(weights, state, count, how)

    monkeypatch.setattr(generate, "_go_on", Counted())
    monkeypatch.setattr(generate, "PATIENCE", 0.0)
    one_by_one = text(weights, prompt_BT, 41, seed=3, temperature=1.0)
    assert counts == [1] * 40
    counts.clear()
    monkeypatch.setattr(generate, "PATIENCE", 1e9)
    many = text(weights, prompt_BT, 41, seed=3, temperature=1.0)
    assert counts == [1, 16, 16, 7]
    assert np.array_equal(one_by_one, many)


def test_what_is_carried_from_token_to_token_is_the_cache_and_it_is_written_in_place(weights):
    """A step's memory beside its arguments is less than a copy of one layer's latents."""
    length = 8192
    cfg = TWO
    cache = tuple(
        Cache(jnp.zeros((1, length, cfg.kv_latent)), jnp.zeros((1, length, cfg.rope_dim)))
        for _ in range(cfg.num_layers)
    )
    state = State(jnp.zeros(1, jnp.int32), jnp.int32(0), cache)
    values = cfg.num_layers * length * (cfg.kv_latent + cfg.rope_dim)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == values + 2  # token and position
    memory = generate._go_on.lower(weights, state, np.int32(1), sampling(0)).compile()
    memory = memory.memory_analysis()
    assert memory.alias_size_in_bytes >= 4 * values
    assert memory.temp_size_in_bytes < 4 * length * cfg.kv_latent


def test_rows_of_a_batch_do_not_see_one_another(weights):
    prompt_BT = np.asarray(random_tokens(TINY, ROWS, 5))
    other_BT = np.stack([prompt_BT[0], np.asarray(random_tokens(TINY, 1, 5, seed=9))[0]])
    one, other = text(weights, prompt_BT, 7), text(weights, other_BT, 7)
    assert np.array_equal(one[0], other[0])
    assert not np.array_equal(one[1], other[1])


def test_a_seed_and_a_temperature_decide_the_text(weights):
    prompt_BT = np.asarray(random_tokens(TINY, ROWS, 5))
    warm = text(weights, prompt_BT, 7, temperature=1.0)
    assert np.array_equal(warm, text(weights, prompt_BT, 7, temperature=1.0))
    assert not np.array_equal(warm, text(weights, prompt_BT, 7, temperature=1.0, seed=1))
    cold = text(weights, prompt_BT, 7)
    assert np.array_equal(cold, text(weights, prompt_BT, 7, seed=1))
    assert not np.array_equal(warm, cold)
    assert np.array_equal(cold, text(weights, prompt_BT, 7, temperature=1.0, top_p=1e-3))
    twice = text(weights, np.stack([prompt_BT[0]] * 2), 7, temperature=1.0)
    assert not np.array_equal(twice[0], twice[1])  # each row has its own luck
    hot = text(weights, prompt_BT, 7, temperature=1e6)  # all tokens alike: luck alone
    assert len(np.unique(hot)) > 7


@pytest.mark.slow
def test_fp8_weights_write_what_their_expansion_writes(tmp_path: Path):
    unset = {"init_std": 0.006, "yarn": YarnConfig(factor=1.0)}  # in a config.json
    cfg = replace(TINY, num_layers=1, num_dense_layers=0, mtp_depth=0, **unset)
    folder = write_folder(tmp_path, cfg, random_tensors(cfg, fp8=True))
    kept, expanded = lay_out(load(folder, keep_fp8=True)), lay_out(load(folder))
    assert isinstance(kept.layers[0].block.moe.w_gate_EDF[...], Blocked)
    assert expanded.layers[0].block.moe.w_gate_EDF.dtype == jnp.bfloat16
    prompt_BT = random_tokens(cfg, 1, 5)
    assert np.array_equal(text(kept, prompt_BT, 7), text(expanded, prompt_BT, 7))


@pytest.mark.parametrize(("length", "new"), [(0, 1), (3, 0), (60, 5), (64, 1)])
def test_what_has_no_room_is_refused(weights, length: int, new: int):
    said = rf"a prompt of {length} tokens and {new} to follow; .* model.max_length = 64"
    with pytest.raises(ValueError, match=said):
        text(weights, np.zeros((1, length), np.int32), new)


def test_a_text_may_fill_the_longest_sequence(weights):
    assert text(weights, np.zeros((ROWS, 60), np.int32), 4).shape == (ROWS, 4)
    assert text(weights, np.zeros((ROWS, 63), np.int32), 1).shape == (ROWS, 1)
