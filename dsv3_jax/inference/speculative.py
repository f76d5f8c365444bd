"""Drafts of the MTP modules, and the main model's verdict on them (report 2.2, 5.4.3; facts H.3).

Module k makes the draft of the k-th token after the newest one from the hidden state of module
k - 1 at the position before the newest token, and the embedding of the token k places on: the
newest, or a draft. The main model then reads the newest token and all drafts in one pass. Greedy
rows take drafts as long as they are what the model itself would have taken. In the others, draft x
from q is taken with probability min(1, p(x) / q(x)), else a token from what p has beyond q: what
comes out has exactly the distribution p, whatever the drafts are worth.

What is drawn depends on a row's seed and the position alone, so a text does not depend on its
neighbours; without drafts it is what `sampling.choose` draws.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.inference.sampling import RowSampling, tempered

# What is drawn at a position beside the token itself, which has the position's own key.
_DRAFT, _ACCEPT, _INSTEAD = 1, 2, 3


class Verdict(NamedTuple):
    """Tokens int32 [B, J] of which a row takes the first `taken` (1 to J = drafts + 1), and the
    logarithm of their probabilities at temperature 1; those of the likeliest tokens, [B, J, n].
    """

    token_BJ: jax.Array
    taken_B: jax.Array
    logprob_BJ: jax.Array
    top_BJn: jax.Array
    top_logprob_BJn: jax.Array


def draw_draft(logits_BV: jax.Array, position_B: jax.Array, how: RowSampling) -> jax.Array:
    """int32 [B]: drafts of the tokens after these positions."""
    greedy_B = logits_BV.argmax(-1).astype(jnp.int32)

    def drawn() -> jax.Array:
        logits = _of_rows(logits_BV[:, None], how)[:, 0]
        token_B = jax.vmap(jax.random.categorical)(_keys(how, position_B, _DRAFT), logits)
        return jnp.where(how.temperature_B > 0, token_B.astype(jnp.int32), greedy_B)

    return lax.cond((how.temperature_B > 0).any(), drawn, lambda: greedy_B)


def verify(
    logits_BJV: jax.Array,
    draft_BD: jax.Array,
    draft_logits_BDV: jax.Array,
    allowed_B: jax.Array,
    position_B: jax.Array,
    how: RowSampling,
    top: int = 0,
) -> Verdict:
    """The main model's logits after the newest token, at `position`, and after each draft.

    Of the drafts at most `allowed` are looked at. `top` likeliest tokens are told of.
    """
    drafts = draft_BD.shape[1]
    greedy_BJ = logits_BJV.argmax(-1).astype(jnp.int32)
    as_greedy = draft_BD == greedy_BJ[:, :drafts], greedy_BJ

    def drawn() -> tuple[jax.Array, jax.Array]:
        found = _reject(logits_BJV, draft_BD, draft_logits_BDV, allowed_B, position_B, how)
        warm_B1 = (how.temperature_B > 0)[:, None]
        return tuple(jnp.where(warm_B1, *pair) for pair in zip(found, as_greedy, strict=True))

    accepted_BD, token_BJ = lax.cond((how.temperature_B > 0).any(), drawn, lambda: as_greedy)
    looked_at_BD = jnp.arange(drafts)[None] < allowed_B[:, None]
    taken_BD = jnp.cumprod(accepted_BD & looked_at_BD, axis=1, dtype=jnp.int32)
    token_BJ = token_BJ.at[:, :drafts].set(jnp.where(taken_BD > 0, draft_BD, token_BJ[:, :drafts]))
    logprob_BJV = jax.nn.log_softmax(logits_BJV, axis=-1)
    logprob_BJ = jnp.take_along_axis(logprob_BJV, token_BJ[..., None], axis=-1)[..., 0]
    top_logprob_BJn, top_BJn = lax.top_k(logprob_BJV, top)
    return Verdict(
        token_BJ, taken_BD.sum(1, dtype=jnp.int32) + 1, logprob_BJ, top_BJn, top_logprob_BJn
    )


def _reject(logits_BJV, draft_BD, draft_logits_BDV, allowed_B, position_B, how):
    """Whether each draft is accepted, and the token in its place if it is not; behind the last
    draft a token of the model's own.
    """
    drafts = draft_BD.shape[1]
    logits_BJV = _of_rows(logits_BJV, how)
    position_BJ = position_B[:, None] + jnp.arange(drafts + 1)[None]
    p_BDV = jax.nn.softmax(logits_BJV[:, :drafts])
    q_BDV = jax.nn.softmax(_of_rows(draft_logits_BDV, how))
    p_BD, q_BD = (
        jnp.take_along_axis(x_BDV, draft_BD[..., None], axis=-1)[..., 0] for x_BDV in (p_BDV, q_BDV)
    )
    uniform = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, dtype=p_BD.dtype)))
    u_BD = uniform(_keys(how, position_BJ[:, :drafts], _ACCEPT))
    # A draft from NaN is not accepted, and takes nothing from p. Where q is p but for rounding,
    # nothing may be left to draw from.
    beyond_BDV = jnp.maximum(p_BDV - jnp.where(jnp.isnan(q_BDV), 0, q_BDV), 0)
    beyond_BDV = jnp.log(jnp.where((beyond_BDV > 0).any(-1, keepdims=True), beyond_BDV, p_BDV))
    draw = jax.vmap(jax.vmap(jax.random.categorical))
    instead_BD = draw(_keys(how, position_BJ[:, :drafts], _INSTEAD), beyond_BDV)
    own_BJ = draw(_keys(how, position_BJ), logits_BJV)
    looked_at_BD = jnp.arange(drafts)[None] < allowed_B[:, None]
    own_BJ = own_BJ.at[:, :drafts].set(jnp.where(looked_at_BD, instead_BD, own_BJ[:, :drafts]))
    return u_BD * q_BD < p_BD, own_BJ.astype(jnp.int32)


def _of_rows(logits_BJV: jax.Array, how: RowSampling) -> jax.Array:
    """`tempered` row by row."""
    b, j, v = logits_BJV.shape
    per_row = (jnp.repeat(x_B, j)[:, None] for x_B in (how.temperature_B, how.top_p_B))
    return tempered(logits_BJV.reshape(b * j, v), *per_row).reshape(b, j, v)


def _keys(how: RowSampling, position: jax.Array, use: int | None = None) -> jax.Array:
    """Keys of rows' positions, [B] or [B, J]."""

    def key(seed: jax.Array, position: jax.Array) -> jax.Array:
        at = jax.random.fold_in(jax.random.key(seed), position)
        return at if use is None else jax.random.fold_in(at, use)

    if position.ndim == 2:
        key = jax.vmap(key, in_axes=(None, 0))
    return jax.vmap(key)(how.seed_B, position)
