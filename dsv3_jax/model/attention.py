"""Causal softmax attention in chunks of query rows, and its plain twin (report Eq. 10).

A chunk sees only the keys up to its own last row, so half of the scores are never computed, and
no [T, S] score tensor of the whole batch exists. The backward pass keeps the output and the
log-sum-exp of each row and computes the scores once more.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.quant.wide import wide_einsum

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
    t, s = q_BTHN.shape[1], k_BSHN.shape[1]
    seen_BTS = (jnp.arange(s)[None, :] <= jnp.arange(s - t, s)[:, None])[None]
    if segments_BS is not None:
        seen_BTS &= segments_BS[:, s - t :, None] == segments_BS[:, None]
    return masked_attention(q_BTHN, k_BSHN, v_BSHU, scale, seen_BTS)


def masked_attention(
    q_BTHN: jax.Array, k_BSHN: jax.Array, v_BSHU: jax.Array, scale: float, seen_BTS: jax.Array
) -> jax.Array:
    """softmax(q k^T scale) v over the keys that a query sees (bool [B or 1, T, S]), at least one.
    -> [B, T, H, U] in q's dtype.
    """
    scores_BHTS = wide_einsum("bthn,bshn->bhts", q_BTHN, k_BSHN) * scale
    scores_BHTS = jnp.where(seen_BTS[:, None], scores_BHTS, -jnp.inf)
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
    q_BHTN, k_BHTN, v_BHTU = (_heads_first(x) for x in (q_BTHN, k_BTHN, v_BTHU))
    outputs, lses = [], []
    for start, stop in _chunks(q_BHTN.shape[2]):
        k_BHSN, v_BHSU = k_BHTN[:, :, :stop], v_BHTU[:, :, :stop]
        scores_BHTS = wide_einsum("bhtn,bhsn->bhts", q_BHTN[:, :, start:stop], k_BHSN)
        scores_BHTS = jnp.where(_seen(start, stop, segments_BT), scores_BHTS, -jnp.inf)
        max_BHT1 = scores_BHTS.max(-1, keepdims=True)
        # The scale acts in the exponent, which costs no pass over the scores of its own.
        p_BHTS = jnp.exp((scores_BHTS - max_BHT1) * scale)
        sum_BHT1 = p_BHTS.sum(-1, keepdims=True)
        o_BHTU = wide_einsum("bhts,bhsu->bhtu", p_BHTS.astype(v_BHSU.dtype), v_BHSU) / sum_BHT1
        outputs.append(o_BHTU.astype(q_BHTN.dtype))
        lses.append((max_BHT1 * scale + jnp.log(sum_BHT1))[..., 0])
    o_BTHU = checkpoint_name(_heads_first(jnp.concatenate(outputs, 2)), "attention_out")
    lse_BHT = checkpoint_name(jnp.concatenate(lses, 2), "attention_lse")
    return o_BTHU, (q_BTHN, k_BTHN, v_BTHU, segments_BT, o_BTHU, lse_BHT)


def _attention_bwd(scale, residuals, do_BTHU):
    *qkv, segments_BT, o_BTHU, lse_BHT = residuals
    dtype, acc = o_BTHU.dtype, lse_BHT.dtype
    delta_BHT = jnp.einsum("bthu,bthu->bht", do_BTHU.astype(acc), o_BTHU.astype(acc))
    q_BHTN, k_BHTN, v_BHTU, do_BHTU = (_heads_first(x) for x in (*qkv, do_BTHU))
    chunks, dqs, dks, dvs = _chunks(q_BHTN.shape[2]), [], [], []
    for start, stop in chunks:
        q_chunk_BHTN, do_chunk_BHTU = q_BHTN[:, :, start:stop], do_BHTU[:, :, start:stop]
        k_BHSN, v_BHSU = k_BHTN[:, :, :stop], v_BHTU[:, :, :stop]
        scores_BHTS = wide_einsum("bhtn,bhsn->bhts", q_chunk_BHTN, k_BHSN)
        p_BHTS = jnp.exp(scores_BHTS * scale - lse_BHT[..., start:stop, None])
        p_BHTS = jnp.where(_seen(start, stop, segments_BT), p_BHTS, 0)
        dp_BHTS = wide_einsum("bhtu,bhsu->bhts", do_chunk_BHTU, v_BHSU)
        ds_BHTS = (p_BHTS * (dp_BHTS - delta_BHT[..., start:stop, None]) * scale).astype(dtype)
        dqs.append(wide_einsum("bhts,bhsn->bhtn", ds_BHTS, k_BHSN).astype(dtype))
        # Keys last: XLA:CPU is twice as fast at this product as at the one with keys before N.
        dks.append(wide_einsum("bhtn,bhts->bhns", q_chunk_BHTN, ds_BHTS))
        dvs.append(wide_einsum("bhtu,bhts->bhus", do_chunk_BHTU, p_BHTS.astype(dtype)))
    dq_BTHN = _heads_first(jnp.concatenate(dqs, 2))
    dk_BTHN, dv_BTHU = (_over_queries(parts, chunks).astype(dtype) for parts in (dks, dvs))
    return dq_BTHN, dk_BTHN, dv_BTHU, None


attention.defvjp(_attention_fwd, _attention_bwd)


def _heads_first(x_BTHN: jax.Array) -> jax.Array:
    """[B, T, H, N] as [B, H, T, N], and back."""
    return x_BTHN.swapaxes(1, 2)


def _over_queries(parts_BHNS: list[jax.Array], chunks: list[tuple[int, int]]) -> jax.Array:
    """Sum of what every chunk of queries gives to the keys it sees. -> [B, S, H, N]."""
    sums = [
        sum(part_BHNS[..., start:stop] for part_BHNS in parts_BHNS[i:])
        for i, (start, stop) in enumerate(chunks)
    ]
    return jnp.concatenate(sums, -1).transpose(0, 3, 1, 2)


def _seen(start: int, stop: int, segments_BT: jax.Array | None) -> jax.Array:
    """bool [1 or B, 1, T, S]: whether queries start..stop see keys 0..stop."""
    queries_T, keys_S = jnp.arange(start, stop), jnp.arange(stop)
    seen_BTS = (keys_S[None, :] <= queries_T[:, None])[None]
    if segments_BT is not None:
        seen_BTS &= segments_BT[:, start:stop, None] == segments_BT[:, None, :stop]
    return seen_BTS[:, None]


def _chunks(length: int) -> list[tuple[int, int]]:
    size = max(MIN_CHUNK, -(-length // MAX_CHUNKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]
