"""Causal softmax attention in chunks of query rows, and its plain twin (report Eq. 10).

A chunk sees only the keys up to its own last row, so half of the scores are never computed, and
no [T, S] score tensor of the whole batch exists. The backward pass keeps the output and the
log-sum-exp of each row and computes the scores once more.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.quant.gemm import wide_einsum

# Rows of a chunk: at least 128 (a GEMM's worth), and at most 16 chunks, since they are unrolled
# in the program.
MIN_CHUNK, MAX_CHUNKS = 128, 16


def plain_attention(
    q_BTHN: jax.Array,
    k_BSHN: jax.Array,
    v_BSHU: jax.Array,
    scale: float,
    segments_BS: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T scale) v with the last query on the last key. -> [B, T, H, U] in q's dtype.

    With segments (int32) a query sees the keys of its own segment only.
    """
    scores_BHTS = _scores(q_BTHN, k_BSHN, scale, segments_BS)
    p_BHTS = jax.nn.softmax(scores_BHTS, axis=-1).astype(v_BSHU.dtype)
    return wide_einsum("bhts,bshu->bthu", p_BHTS, v_BSHU).astype(q_BTHN.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def attention(
    q_BTHN: jax.Array,
    k_BTHN: jax.Array,
    v_BTHU: jax.Array,
    scale: float,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """`plain_attention` over as many keys as queries, in chunks. -> [B, T, H, U] in q's dtype."""
    return _attention_fwd(q_BTHN, k_BTHN, v_BTHU, scale, segments_BT)[0]


def _attention_fwd(q_BTHN, k_BTHN, v_BTHU, scale, segments_BT):
    outputs, lses = [], []
    for start, stop in _chunks(q_BTHN.shape[1]):
        rows, seen = slice(start, stop), slice(stop)
        segments_BS = _first(segments_BT, stop)
        scores_BHTS = _scores(q_BTHN[:, rows], k_BTHN[:, seen], scale, segments_BS)
        lse_BHT = jax.nn.logsumexp(scores_BHTS, axis=-1)
        p_BHTS = jnp.exp(scores_BHTS - lse_BHT[..., None]).astype(v_BTHU.dtype)
        outputs.append(wide_einsum("bhts,bshu->bthu", p_BHTS, v_BTHU[:, seen]))
        lses.append(lse_BHT)
    o_BTHU = checkpoint_name(jnp.concatenate(outputs, 1).astype(q_BTHN.dtype), "attention_out")
    lse_BHT = checkpoint_name(jnp.concatenate(lses, -1), "attention_lse")
    return o_BTHU, (q_BTHN, k_BTHN, v_BTHU, segments_BT, o_BTHU, lse_BHT)


def _attention_bwd(scale, residuals, do_BTHU):
    q_BTHN, k_BTHN, v_BTHU, segments_BT, o_BTHU, lse_BHT = residuals
    dtype, acc = q_BTHN.dtype, lse_BHT.dtype
    delta_BHT = jnp.einsum("bthu,bthu->bht", do_BTHU.astype(acc), o_BTHU.astype(acc))
    chunks, dk_BSHN, dv_BSHU = [], jnp.zeros(k_BTHN.shape, acc), jnp.zeros(v_BTHU.shape, acc)
    for start, stop in _chunks(q_BTHN.shape[1]):
        rows, seen = slice(start, stop), slice(stop)
        segments_BS = _first(segments_BT, stop)
        scores_BHTS = _scores(q_BTHN[:, rows], k_BTHN[:, seen], scale, segments_BS)
        p_BHTS = jnp.exp(scores_BHTS - lse_BHT[..., rows, None])
        dp_BHTS = wide_einsum("bthu,bshu->bhts", do_BTHU[:, rows], v_BTHU[:, seen])
        ds_BHTS = (p_BHTS * (dp_BHTS - delta_BHT[..., rows, None]) * scale).astype(dtype)
        chunks.append(wide_einsum("bhts,bshn->bthn", ds_BHTS, k_BTHN[:, seen]))
        dk_chunk_BSHN = wide_einsum("bhts,bthn->bshn", ds_BHTS, q_BTHN[:, rows])
        dv_chunk_BSHU = wide_einsum("bhts,bthu->bshu", p_BHTS.astype(dtype), do_BTHU[:, rows])
        dk_BSHN = dk_BSHN.at[:, seen].add(dk_chunk_BSHN)
        dv_BSHU = dv_BSHU.at[:, seen].add(dv_chunk_BSHU)
    dq_BTHN = jnp.concatenate(chunks, 1)
    return dq_BTHN.astype(dtype), dk_BSHN.astype(dtype), dv_BSHU.astype(dtype), None


attention.defvjp(_attention_fwd, _attention_bwd)


def _chunks(length: int) -> list[tuple[int, int]]:
    size = max(MIN_CHUNK, -(-length // MAX_CHUNKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _first(segments_BT: jax.Array | None, stop: int) -> jax.Array | None:
    return None if segments_BT is None else segments_BT[:, :stop]


def _scores(q_BTHN, k_BSHN, scale: float, segments_BS: jax.Array | None) -> jax.Array:
    """Scaled scores, -inf where a key comes after its query or belongs to another segment.

    The last query stands on the last key.
    """
    scores_BHTS = wide_einsum("bthn,bshn->bhts", q_BTHN, k_BSHN) * scale
    t, s = scores_BHTS.shape[-2:]
    seen_BTS = (jnp.arange(s)[None, :] <= jnp.arange(s - t, s)[:, None])[None]
    if segments_BS is not None:
        seen_BTS &= segments_BS[:, s - t :, None] == segments_BS[:, None]
    return jnp.where(seen_BTS[:, None], scores_BHTS, -jnp.inf)
