"""Causal attention in blocks of queries and of keys: memory linear in a row's length, on one device
or on several that share the row (report 4.3).

No block of scores is larger than BLOCK x BLOCK; each query keeps its running maximum and sum, so
that blocks of keys may come one after the other. The backward pass keeps each query's output and
log-sum-exp and computes the scores once more, as `attention` does.

Of a shared row a device has its queries and its latents. It gathers the row's latents, and expands
them to keys and values per head one block at a time: what it holds of the whole row is C + R
numbers a token, not H (N + R + U). Its queries are the two chunks that `RowShards` gives it, so all
devices have the same number of blocks of scores.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.parallel.mesh import varying_like
from dsv3_jax.parallel.sequence import RowShards
from dsv3_jax.quant.wide import wide, wide_einsum

# Queries and keys of a block, at most.
BLOCK = 512

# (a block of what keys and values come from, trained and fixed parts of a weight) -> keys
# [B, S, H, N] and values [B, S, H, U]
Expand = Callable[[Any, Any, Any], tuple[jax.Array, jax.Array]]


class _Static(NamedTuple):
    """What does not depend on numbers."""

    expand: Expand
    scale: float
    block: int
    shards: RowShards | None


class _Seen(NamedTuple):
    """Which keys this device's M blocks of queries see."""

    static: _Static
    place_M: jax.Array
    """Where they stand in the row, in blocks: int32 [M], ascending"""
    queries_MBT: jax.Array | None
    """Segments of queries, if rows have any"""
    keys_BS: jax.Array | None
    """And of the row's keys"""

    @property
    def end(self) -> jax.Array:
        """The number of blocks of keys that any query sees."""
        return self.place_M[-1] + 1

    def first(self, j: jax.Array) -> jax.Array:
        """The first block of queries that sees block j of keys; all later ones do."""
        return (self.place_M < j).sum(dtype=jnp.int32)

    def stored(self, j: jax.Array) -> jax.Array:
        """Where block j of the row's keys stands among all devices' parts."""
        shards, blocks = self.static.shards, len(self.place_M) // 2
        return shards.place_in_gathered(j, blocks) if shards else j

    def by(self, m: jax.Array, j: jax.Array) -> jax.Array:
        """bool [1 or B, 1, T, S]: whether queries of block m see keys of block j."""
        size = self.static.block
        in_block = jnp.arange(size, dtype=jnp.int32)
        query_T, key_S = self.place_M[m] * size + in_block, j * size + in_block
        seen_BTS = (key_S[None, :] <= query_T[:, None])[None]
        if self.keys_BS is not None:
            keys_BS = _block(self.keys_BS, self.stored(j), self.static)
            seen_BTS &= self.queries_MBT[m][:, :, None] == keys_BS[:, None]
        return seen_BTS[:, None]


class _Running(NamedTuple):
    """Of each query, over the keys so far: largest score, and sums relative to it."""

    max_MBHT: jax.Array
    sum_MBHT: jax.Array
    o_MBHTU: jax.Array


def blockwise_attention(
    q_BTHN: jax.Array,
    k_BTHN: jax.Array,
    v_BTHU: jax.Array,
    scale: float,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """`plain_attention` over as many keys as queries. -> [B, T, H, U] in q's dtype."""
    length = q_BTHN.shape[1]
    block = min(BLOCK, length)

    def padded(x: jax.Array) -> jax.Array:  # no query of the row sees what stands behind it
        return jnp.pad(x, ((0, 0), (0, -length % block), *[(0, 0)] * (x.ndim - 2)))

    q_BTHN, k_BTHN, v_BTHU, segments_BT = jax.tree.map(
        padded, (q_BTHN, k_BTHN, v_BTHU, segments_BT)
    )
    static = _Static(_as_given, scale, block, None)
    return _blockwise(static, q_BTHN, (k_BTHN, v_BTHU), (), (), segments_BT)[:, :length]


def _as_given(source: Any, trained: tuple, fixed: tuple) -> Any:
    del trained, fixed
    return source


def latent_attention(
    q_BTHN: jax.Array,
    latents: Any,
    expand: Expand,
    trained: Any,
    fixed: Any,
    scale: float,
    shards: RowShards,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """Of a row that `shards` share: this device's queries over all keys before them, expanded from
    all devices' latents (arrays [B, T, ...]). -> [B, T, H, U] in q's dtype; T is one device's part.
    """
    chunk = q_BTHN.shape[1] // 2
    block = next(size for size in range(min(BLOCK, chunk), 0, -1) if chunk % size == 0)
    static = _Static(expand, scale, block, shards)
    return _blockwise(static, q_BTHN, latents, trained, fixed, segments_BT)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(static, q_BTHN, source, trained, fixed, segments_BT):
    return _forward(static, q_BTHN, source, trained, fixed, segments_BT)[0]


def _forward(static, q_BTHN, source, trained, fixed, segments_BT):
    q_MBHTN, whole = _in_blocks(q_BTHN, static.block), _whole(static, source)
    seen = _make_seen(static, q_BTHN, segments_BT)
    v_BHSU = jax.eval_shape(partial(_keys, static), _block(whole, 0, static), trained, fixed)[1]
    shape, high = q_MBHTN.shape[:-1], wide(q_BTHN.dtype)
    start = _Running(
        jnp.full(shape, -jnp.inf, high),
        jnp.zeros(shape, high),
        jnp.zeros((*shape, v_BHSU.shape[-1]), high),
    )

    def of_keys(j, running):
        k_BHSN, v_BHSU = _keys(static, _block(whole, seen.stored(j), static), trained, fixed)

        def of_queries(m, running):
            scores_BHTS = wide_einsum("bhtn,bhsn->bhts", q_MBHTN[m], k_BHSN)
            scores_BHTS = jnp.where(seen.by(m, j), scores_BHTS, -jnp.inf)
            one = _added(_at(running, m), scores_BHTS, v_BHSU, static.scale)
            return jax.tree.map(lambda x, new: x.at[m].set(new), running, one)

        return lax.fori_loop(seen.first(j), len(q_MBHTN), of_queries, running)

    start = varying_like(start, q_BTHN, source, trained, fixed)
    running = lax.fori_loop(0, seen.end, of_keys, start)
    o_MBHTU = running.o_MBHTU / running.sum_MBHT[..., None]
    lse_MBHT = running.max_MBHT * static.scale + jnp.log(running.sum_MBHT)
    o_BTHU = checkpoint_name(_in_rows(o_MBHTU).astype(q_BTHN.dtype), "attention_out")
    lse_MBHT = checkpoint_name(lse_MBHT, "attention_lse")
    return o_BTHU, (q_BTHN, source, trained, fixed, segments_BT, o_BTHU, lse_MBHT)


def _backward(static, residuals, do_BTHU):
    q_BTHN, source, trained, fixed, segments_BT, o_BTHU, lse_MBHT = residuals
    dtype, high = q_BTHN.dtype, lse_MBHT.dtype
    q_MBHTN, do_MBHTU, o_MBHTU = (_in_blocks(x, static.block) for x in (q_BTHN, do_BTHU, o_BTHU))
    delta_MBHT = (do_MBHTU.astype(high) * o_MBHTU.astype(high)).sum(-1)
    # Latents are gathered when their layer's turn has come: else the compiler keeps what the
    # forward pass gathered, or gathers those of all layers at once (XLA:CPU drops this barrier).
    source, do_MBHTU = lax.optimization_barrier((source, do_MBHTU))
    whole = _whole(static, source)
    seen = _make_seen(static, q_BTHN, segments_BT)

    def of_keys(j, carry):
        dq_MBHTN, dwhole, dtrained = carry
        (k_BHSN, v_BHSU), pull = jax.vjp(
            lambda source, trained: _keys(static, source, trained, fixed),
            _block(whole, seen.stored(j), static),
            trained,
        )

        def of_queries(m, carry):
            dq_MBHTN, dk_BHSN, dv_BHSU = carry
            q_BHTN, do_BHTU = q_MBHTN[m], do_MBHTU[m]
            scores_BHTS = wide_einsum("bhtn,bhsn->bhts", q_BHTN, k_BHSN)
            p_BHTS = jnp.exp(scores_BHTS * static.scale - lse_MBHT[m][..., None])
            p_BHTS = jnp.where(seen.by(m, j), p_BHTS, 0)
            dp_BHTS = wide_einsum("bhtu,bhsu->bhts", do_BHTU, v_BHSU)
            ds_BHTS = p_BHTS * (dp_BHTS - delta_MBHT[m][..., None]) * static.scale
            ds_BHTS = ds_BHTS.astype(dtype)
            dq_MBHTN = dq_MBHTN.at[m].add(wide_einsum("bhts,bhsn->bhtn", ds_BHTS, k_BHSN))
            dk_BHSN += wide_einsum("bhts,bhtn->bhsn", ds_BHTS, q_BHTN)
            dv_BHSU += wide_einsum("bhts,bhtu->bhsu", p_BHTS.astype(dtype), do_BHTU)
            return dq_MBHTN, dk_BHSN, dv_BHSU

        zeros = (jnp.zeros(x.shape, high) for x in (k_BHSN, v_BHSU))
        start = (dq_MBHTN, *varying_like(tuple(zeros), dq_MBHTN))
        dq_MBHTN, dk_BHSN, dv_BHSU = lax.fori_loop(seen.first(j), len(q_MBHTN), of_queries, start)
        dblock, more = pull((dk_BHSN.astype(k_BHSN.dtype), dv_BHSU.astype(v_BHSU.dtype)))
        start = seen.stored(j) * static.block
        dwhole = jax.tree.map(partial(_put_block, start=start), dwhole, dblock)
        return dq_MBHTN, dwhole, jax.tree.map(jnp.add, dtrained, more)

    # Of a shared row, several devices' gradients of the same latents will be summed.
    dwhole = jax.tree.map(lambda x: jnp.zeros(x.shape, high if static.shards else x.dtype), whole)
    start = jnp.zeros(q_MBHTN.shape, high), dwhole, jax.tree.map(jnp.zeros_like, trained)
    start = varying_like(start, q_BTHN, source, trained, fixed, do_BTHU)
    dq_MBHTN, dwhole, dtrained = lax.fori_loop(0, seen.end, of_keys, start)
    dsource = _own_gradient(static, source, dwhole)
    return _in_rows(dq_MBHTN).astype(dtype), dsource, dtrained, None, None


_blockwise.defvjp(_forward, _backward)


def _added(running: _Running, scores_BHTS: jax.Array, v_BHSU: jax.Array, scale: float) -> _Running:
    """A block of queries after one more block of keys; unseen keys have scores of -inf."""
    max_BHT = jnp.maximum(running.max_MBHT, scores_BHTS.max(-1))
    # Of a query that has seen no key yet, -inf - -inf would be NaN.
    shift_BHT = jnp.where(max_BHT == -jnp.inf, 0, max_BHT)
    p_BHTS = jnp.exp((scores_BHTS - shift_BHT[..., None]) * scale)
    kept_BHT = jnp.exp((running.max_MBHT - shift_BHT) * scale)
    o_BHTU = wide_einsum("bhts,bhsu->bhtu", p_BHTS.astype(v_BHSU.dtype), v_BHSU)
    return _Running(
        max_BHT,
        running.sum_MBHT * kept_BHT + p_BHTS.sum(-1),
        running.o_MBHTU * kept_BHT[..., None] + o_BHTU,
    )


def _make_seen(static: _Static, q_BTHN: jax.Array, segments_BT: jax.Array | None) -> _Seen:
    length, shards = q_BTHN.shape[1], static.shards
    place_T = jnp.arange(length, dtype=jnp.int32) if shards is None else shards.places(length)
    queries_MBT, keys_BS = None, segments_BT
    if segments_BT is not None:
        queries_MBT = segments_BT.reshape(len(segments_BT), -1, static.block).swapaxes(0, 1)
        keys_BS = segments_BT if shards is None else shards.gathered(segments_BT)
    place_M = place_T[:: static.block] // static.block
    return _Seen(static, place_M, queries_MBT, keys_BS)


def _whole(static: _Static, source: Any) -> Any:
    """What keys and values of the whole row come from, each device's part in turn."""
    return source if static.shards is None else jax.tree.map(static.shards.gathered, source)


def _own_gradient(static: _Static, source: Any, dwhole: Any) -> Any:
    """`_whole` transposed."""
    if static.shards is None:
        return dwhole

    def own(x: jax.Array, dx: jax.Array) -> jax.Array:
        _, pull = jax.vjp(static.shards.gathered, x.astype(dx.dtype))
        return pull(dx)[0].astype(x.dtype)

    return jax.tree.map(own, source, dwhole)


def _keys(static: _Static, source: Any, trained: Any, fixed: Any) -> tuple:
    """A block's keys [B, H, S, N] and values [B, H, S, U]."""
    k_BSHN, v_BSHU = static.expand(source, trained, fixed)
    return k_BSHN.swapaxes(1, 2), v_BSHU.swapaxes(1, 2)


def _block(whole: Any, place: Any, static: _Static) -> Any:
    """Of arrays [B, T, ...] the tokens of one block."""
    size = static.block
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, place * size, size, axis=1), whole)


def _put_block(x_BT: jax.Array, block_BS: jax.Array, start: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x_BT, block_BS.astype(x_BT.dtype), start, axis=1)


def _at(tree: Any, m: jax.Array) -> Any:
    return jax.tree.map(lambda x: x[m], tree)


def _in_blocks(x_BTHN: jax.Array, block: int) -> jax.Array:
    """[B, T, H, N] -> [M, B, H, block, N]."""
    b, _, h, n = x_BTHN.shape
    return x_BTHN.reshape(b, -1, block, h, n).transpose(1, 0, 3, 2, 4)


def _in_rows(x_MBHTN: jax.Array) -> jax.Array:
    """`_in_blocks` undone."""
    m, b, h, t, n = x_MBHTN.shape
    return x_MBHTN.transpose(1, 0, 3, 2, 4).reshape(b, m * t, h, n)
