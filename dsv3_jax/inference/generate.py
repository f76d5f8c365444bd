"""Sampling one token at a time over the latent cache, with absorbed weights (report 2.1.1)."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.inference.cache import Cache, empty_cache
from dsv3_jax.model.block import Block
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.model.yarn import rope_table


def decode(
    model: DeepSeekV3, token_B: jax.Array, position: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Logits [B, V] after one more token of every row at `position`, and the extended cache."""
    x_BTD = model.embed(token_B[:, None])
    rope_BTR = rope_table(model.cfg, position[None, None], x_BTD.dtype)
    dense = model.cfg.num_dense_layers
    parts = []
    for layers, start, stop in ((model.dense_layers, 0, dense), (model.moe_layers, dense, None)):
        if layers is not None:
            part = jax.tree.map(lambda c, start=start, stop=stop: c[start:stop], cache)
            step = partial(_decode_block, rope_BTR=rope_BTR, position=position)
            x_BTD, part = lax.scan(step, x_BTD, (layers, part))
            parts.append(part)
    h_BTD = rms_norm(x_BTD, model.norm_D[...], model.cfg.rms_eps)
    return model.logits(h_BTD)[:, 0], jax.tree.map(lambda *c: jnp.concatenate(c), *parts)


def _decode_block(x_BTD, layer: tuple[Block, Cache], rope_BTR, position):
    """One layer: extend its cache by this token and attend over it."""
    block, part = layer
    normed_BTD = rms_norm(x_BTD, block.attention_norm_D[...], block.eps)
    part = jax.tree.map(
        lambda old, new: lax.dynamic_update_slice_in_dim(old, new, position, axis=1),
        part,
        Cache(*block.mla.latents(normed_BTD, rope_BTR)),
    )
    rows, length = part.c_kv_LBSC.shape[:2]
    seen_BTS = jnp.broadcast_to(jnp.arange(length) <= position, (rows, 1, length))
    x_BTD += block.mla.absorbed(normed_BTD, rope_BTR, *part, seen_BTS)
    return block.feed_forward(x_BTD, jnp.ones((rows, 1), bool))[0], part


@partial(jax.jit, static_argnums=3)
def sample(
    model: DeepSeekV3, prompt_BT: jax.Array, key: jax.Array, num_tokens: int, temperature: jax.Array
) -> jax.Array:
    """int32 [B, num_tokens] that continue the prompts (all of one length).

    Temperature 0 takes the likeliest token.
    """
    rows, prompt_length = prompt_BT.shape
    cache = empty_cache(model.cfg, rows, prompt_length + num_tokens, model.embed_VD.dtype)

    def step(carry, position):
        token_B, cache = carry
        logits_BV, cache = decode(model, token_B, position, cache)
        greedy_B = logits_BV.argmax(-1)
        divisor = jnp.maximum(temperature, 1e-6).astype(logits_BV.dtype)
        drawn_B = jax.random.categorical(jax.random.fold_in(key, position), logits_BV / divisor)
        chosen_B = jnp.where(temperature > 0, drawn_B, greedy_B)
        given_B = prompt_BT[:, jnp.minimum(position + 1, prompt_length - 1)]
        token_B = jnp.where(position + 1 < prompt_length, given_B, chosen_B).astype(jnp.int32)
        return (token_B, cache), token_B

    positions = jnp.arange(prompt_length + num_tokens - 1)
    _, tokens_TB = lax.scan(step, (prompt_BT[:, 0], cache), positions)
    return tokens_TB[prompt_length - 1 :].T
