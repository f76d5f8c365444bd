"""Texts continued token by token over the latent cache, with absorbed weights (report 2.1.1).

The prompt goes through the naive form in one pass that keeps the latents; every token after it
through the absorbed form. Both programs know few lengths: prompts are filled up to a power of two,
caches grow by doubling. What stands in slots after a row's last token is never looked at, and is
overwritten when the text comes there.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsv3_jax.inference.cache import Cache, extended, lengthened, power_of_two, slots
from dsv3_jax.inference.sampling import Sampling, choose
from dsv3_jax.inference.statistics import Statistics
from dsv3_jax.inference.weights import Weights
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.model.yarn import rope_table

SHORTEST_PROMPT = 16  # shorter ones are filled up to it
# A call of the decoding program makes as many tokens as it can in this time, at most so many: it
# costs about 1 ms to call, as much as a token of a small model, and a reader should not wait.
PATIENCE, MOST_STEPS = 0.05, 16


class State(NamedTuple):
    """Rows on their way: the newest token of each int32 [B], its position, what came before it."""

    token_B: jax.Array
    position: jax.Array
    cache: tuple[Cache, ...]

    @property
    def length(self) -> int:
        """S of the cache."""
        return self.cache[0].c_kv_BSC.shape[1]


def continued(
    weights: Weights,
    prompt_BT: np.ndarray,
    num_tokens: int,
    how: Sampling,
    statistics: Statistics | None = None,
) -> Iterator[np.ndarray]:
    """Yields the next token of every row, int32 [B], `num_tokens` times.

    All prompts (int32 [B, T]) have one length. `statistics` are told the seconds, and how many
    tokens of a row steps brought. ValueError if a prompt is empty, or if there is no room for so
    many tokens after it.
    """
    length, longest = prompt_BT.shape[1], weights.rest.cfg.max_length
    if not 1 <= length < length + num_tokens <= longest:
        raise ValueError(
            f"a prompt of {length} tokens and {num_tokens} to follow; allowed: 1 or more of both, "
            f"together at most model.max_length = {longest}"
        )
    padded = min(max(SHORTEST_PROMPT, power_of_two(length)), longest)
    padded_BT = np.pad(np.asarray(prompt_BT, np.int32), ((0, 0), (0, padded - length)))
    start = weights, padded_BT, np.int32(length), how, slots(padded, longest)
    told = statistics or Statistics()
    with told.measured("compiling"):
        _begin.lower(*start).compile()
    with told.measured("reading"):
        state = jax.block_until_ready(_begin(*start))
    yield np.asarray(state.token_B)
    position, left, count, compiled = length, num_tokens - 1, 1, 0
    while left:
        count = min(count, left)
        state = _with_room(state, position + count, longest)
        if compiled != state.length:
            with told.measured("compiling"):
                _go_on.lower(weights, state, np.int32(count), how).compile()
            compiled = state.length
        with told.measured("going_on") as seconds:
            state, tokens_NB = _go_on(weights, state, np.int32(count), how)
            tokens_NB = np.asarray(tokens_NB)[:count]
            spent = seconds()
        told.stepped += count
        yield from tokens_NB
        position, left = position + count, left - count
        count = min(max(int(count * PATIENCE / spent), 1), MOST_STEPS)


def _with_room(state: State, tokens: int, longest: int) -> State:
    length = slots(tokens, longest)
    if length <= state.length:
        return state
    return state._replace(cache=lengthened(state.cache, length))


@partial(jax.jit, static_argnums=4)
def _begin(weights: Weights, prompt_BT, length, how: Sampling, cache_length: int) -> State:
    """Reads prompts of `length` tokens, filled up to T, and chooses the next token."""
    logits_BV, cache = prefill(weights, prompt_BT, length)
    return State(choose(logits_BV, length - 1, how), length, lengthened(cache, cache_length))


@partial(jax.jit, donate_argnums=1)
def _go_on(weights: Weights, state: State, count, how: Sampling) -> tuple[State, jax.Array]:
    """`count` more tokens, the first rows of int32 [MOST_STEPS, B]; the cache is written in place.

    The weights pass a barrier with the position at each step. Else XLA:CPU would take work on them
    out of the loop: whole experts in float32 for bfloat16 weights, at every call.
    """

    def step(i, carry):
        state, tokens_NB = carry
        kept, position = lax.optimization_barrier((weights, state.position))
        logits_BV, own = decode(kept, state.token_B, position, state.cache)
        token_B = choose(logits_BV, position, how)
        # The place depends on the choice (no id is negative), so all layers have read the cache
        # before it is written. Else XLA:CPU would copy it, once for every reader.
        place = jnp.where(token_B[0] < 0, 0, position)
        cache = extended(state.cache, own, place)
        return State(token_B, position + 1, cache), tokens_NB.at[i].set(token_B)

    tokens_NB = jnp.zeros((MOST_STEPS, *state.token_B.shape), jnp.int32)
    return lax.fori_loop(0, count, step, (state, tokens_NB))


def prefill(
    weights: Weights, tokens_BT: jax.Array, length: jax.Array
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Logits [B, V] after the first `length` tokens, and the latents of all T.

    The tokens after them change nothing: attention is causal, and no expert drops a token.
    """
    rest, cache = weights.rest, []
    x_BTD = rest.embed(tokens_BT)
    rope_BTR = rope_table(rest.cfg, jnp.arange(tokens_BT.shape[1])[None], x_BTD.dtype)
    for block, *_ in weights.layers:
        normed_BTD = rms_norm(x_BTD, block.attention_norm_D[...], block.eps)
        cache.append(Cache(*block.mla.latents(normed_BTD, rope_BTR)))
        x_BTD += block.mla.naive(normed_BTD, rope_BTR, *cache[-1])
        x_BTD = block.feed_forward(x_BTD, jnp.ones(tokens_BT.shape, bool))[0]
    return _logits(rest, lax.dynamic_slice_in_dim(x_BTD, length - 1, 1, axis=1)), tuple(cache)


def decode(
    weights: Weights, token_B: jax.Array, position: jax.Array, cache: tuple[Cache, ...]
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Logits [B, V] after one more token of every row at `position`, and its latents (S = 1)."""
    x_BTD = weights.rest.embed(token_B[:, None])
    rope_BTR = rope_table(weights.rest.cfg, position[None, None], x_BTD.dtype)
    rows, length = cache[0].c_kv_BSC.shape[:2]
    seen_S = jnp.append(jnp.arange(length) < position, True)
    seen_BTS = jnp.broadcast_to(seen_S[None, None], (rows, 1, length + 1))
    latents = []
    for layer, cached in zip(weights.layers, cache, strict=True):
        block = layer.block
        normed_BTD = rms_norm(x_BTD, block.attention_norm_D[...], block.eps)
        own = Cache(*block.mla.latents(normed_BTD, rope_BTR))
        x_BTD += block.mla.absorbed(normed_BTD, rope_BTR, own, cached, seen_BTS, layer.expansion)
        x_BTD = block.feed_forward(x_BTD, jnp.ones((rows, 1), bool))[0]
        latents.append(own)
    return _logits(weights.rest, x_BTD), tuple(latents)


def _logits(rest: DeepSeekV3, x_BTD: jax.Array) -> jax.Array:
    """[B, V], at least float32, of the one position in x [B, 1, D]."""
    return rest.logits(rms_norm(x_BTD, rest.norm_D[...], rest.cfg.rms_eps))[:, 0]
