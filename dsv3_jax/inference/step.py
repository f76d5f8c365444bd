"""The two programs of an engine: a chunk of prompts is read (prefill), and rows go on by one step
or several (decoding). Report 3.4; MTP's drafts 5.4.3.

State between steps is small: what pools hold, and of every row its newest token, which no pool has
seen yet, with the hidden states of the last positions before it. With `D` drafts a step begins
where those are: MTP modules read the last W = 2 D positions, of which up to D + 1 are new since
their last turn and D - 1 were read with drafts that may not have held; then the main model reads
the newest token and the drafts in one pass, and says which of them stay.

Letters: J tokens of a step, the newest and the drafts; D of `hidden` is the model's width as ever,
of what drafts have (`draft_BD`, `logits_BDV`) their number.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.inference.cache import Pool, written
from dsv3_jax.inference.forward import Experts, Part, Passed, forward, through_depth
from dsv3_jax.inference.sampling import RowSampling
from dsv3_jax.inference.speculative import Verdict, draw_draft, verify
from dsv3_jax.inference.weights import Weights
from dsv3_jax.parallel.mesh import varying_like

MOST_STEPS = 16  # of one call


class Rows(NamedTuple):
    """The newest tokens' positions int32 [B]; the tokens of the last W + 1 positions up to it, the
    normed hidden states [B, W, D] of all of these but the newest, and how many of those hold.
    """

    position_B: jax.Array
    recent_Bw: jax.Array
    hidden_BWD: jax.Array
    held_B: jax.Array


class State(NamedTuple):
    """What programs write in place: pools of all layers, MTP's behind the main model's; the rows;
    and the load int32 [L, E'] of every router since it was last looked at.
    """

    pools: tuple[Pool, ...]
    rows: Rows
    load_LE: jax.Array


class Lease(NamedTuple):
    """Of every row: its pages int32 [B, Y]; the position from which on they are its own, before it
    they are borrowed; where the text must end; and how it chooses.
    """

    table_BY: jax.Array
    own_from_B: jax.Array
    limit_B: jax.Array
    how: RowSampling


class Chunk(NamedTuple):
    """Following tokens of B texts, at most T of each, in rows of the state (int32 [B]).

    `token_Bt` has D + 1 more columns: from the chunk's `start` on `known` tokens are known, of
    which `count` are read now. If one more is known, the newest token is that; else it is chosen.
    `first` is the first chunk that is read of a text, whose beginning may be borrowed. `scored`
    says whose prompt is told of.
    """

    row_B: jax.Array
    first_B: jax.Array
    token_Bt: jax.Array
    start_B: jax.Array
    count_B: jax.Array
    known_B: jax.Array
    scored_B: jax.Array


class ReadScores(NamedTuple):
    """What a chunk's positions gave the tokens behind them, as of `Verdict`: [B, T], [B, T, n]."""

    logprob_BT: jax.Array
    top_BTn: jax.Array
    top_logprob_BTn: jax.Array


def empty_rows(rows: int, drafts: int, width: int, dtype: jnp.dtype) -> Rows:
    """Of nobody."""
    zeros = jnp.zeros(rows, jnp.int32)
    recent_Bw = jnp.zeros((rows, 2 * drafts + 1), jnp.int32)
    return Rows(zeros, recent_Bw, jnp.zeros((rows, 2 * drafts, width), dtype), zeros)


# --- prompts -------------------------------------------------------------------------------------


def read_chunks(
    weights: Weights,
    state: State,
    chunks: Sequence[Chunk],
    leases: Sequence[Lease],
    experts: Experts,
    fresh: bool = False,
    top: int = 0,
    scores: bool = False,
) -> tuple[State, list[Verdict], list[ReadScores]]:
    """Reads one chunk for each of some rows; several such micro-batches pass side by side.

    The verdict's one token is the one after each chunk, of use behind a text's last. `fresh` says
    that all of them begin their texts: there is nothing in the pools to look at. There are scores,
    where a row is scored, if the program has `scores`.
    """
    layers = len(weights.layers)
    parts = [
        _part_of_chunk(chunk, lease, len(weights.depths), fresh)
        for chunk, lease in zip(chunks, leases, strict=True)
    ]
    passed = forward(weights, state.pools[:layers], parts, experts)
    verdicts, writes, rows, told = [], [], state.rows, []
    for chunk, lease, part, way in zip(chunks, leases, parts, passed, strict=True):
        last_B11 = jnp.maximum(chunk.count_B - 1, 0)[:, None, None]
        last_B1D = jnp.take_along_axis(way.hidden_BTD, last_B11, axis=1)
        position_B = chunk.start_B + chunk.count_B - 1
        nothing_BD = jnp.zeros((len(position_B), 0), jnp.int32)
        logits_B1V = weights.rest.logits(last_B1D)
        nothing_BDV = logits_B1V[:, :0]
        verdict = verify(
            logits_B1V, nothing_BD, nothing_BDV, position_B * 0, position_B, lease.how, top
        )
        verdicts.append(verdict)
        if scores:
            told.append(_scores(weights, chunk, way.hidden_BTD, top))
        way = _through_known_depths(weights, state, chunk, part, way, experts)
        writes.append(Write(part, lease, way))
        rows = _after_chunk(rows, chunk, way.hidden_BTD, verdict.token_BJ[:, 0])
    return _written(weights, state._replace(rows=rows), writes, verdicts), verdicts, told


def _scores(weights: Weights, chunk: Chunk, h_BTD: jax.Array, top: int) -> ReadScores:
    """Zeros, at no cost, where no row is scored."""

    def scored() -> ReadScores:
        token_BT = chunk.token_Bt[:, 1 : 1 + h_BTD.shape[1]]
        logprob_BTV = jax.nn.log_softmax(weights.rest.logits(h_BTD), axis=-1)
        logprob_BT = jnp.take_along_axis(logprob_BTV, token_BT[..., None], axis=-1)[..., 0]
        top_logprob_BTn, top_BTn = lax.top_k(logprob_BTV, top)
        return ReadScores(logprob_BT, top_BTn, top_logprob_BTn)

    like = jax.eval_shape(scored)
    nothing = varying_like(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), h_BTD)
    return lax.cond(chunk.scored_B.any(), scored, lambda: nothing)


def _part_of_chunk(chunk: Chunk, lease: Lease, drafts: int, fresh: bool) -> Part:
    token_BT = chunk.token_Bt[:, : chunk.token_Bt.shape[1] - drafts - 1]
    place_1T = jnp.arange(token_BT.shape[1])[None]
    position_BT = chunk.start_B[:, None] + place_1T
    live_BT = place_1T < chunk.count_B[:, None]
    table_BY = lease.table_BY[:, :0] if fresh else lease.table_BY
    return Part(token_BT, position_BT, live_BT, chunk.start_B, table_BY)


def _through_known_depths(
    weights: Weights, state: State, chunk: Chunk, part: Part, way: Passed, experts: Experts
) -> Passed:
    """The latents of MTP modules too, wherever the token so many places on is known."""
    h_BTD, tokens = way.hidden_BTD, part.token_BT.shape[1]
    for k, depth in enumerate(weights.depths, start=1):
        place_1T = jnp.arange(tokens)[None]
        live_BT = part.live_BT & (place_1T + k < chunk.known_B[:, None])
        ahead = part._replace(token_BT=chunk.token_Bt[:, k : k + tokens], live_BT=live_BT)
        pool = state.pools[len(weights.layers) + k - 1]
        deeper = through_depth(weights, depth, pool, ahead, h_BTD, experts)
        h_BTD = deeper.hidden_BTD
        way = way._replace(latents=way.latents + deeper.latents, loads=way.loads + deeper.loads)
    return way


def _after_chunk(rows: Rows, chunk: Chunk, h_BTD: jax.Array, chosen_B: jax.Array) -> Rows:
    """The state of the chunk's rows behind it; rows without tokens stay as they are."""
    window = rows.hidden_BWD.shape[1]
    old = jax.tree.map(lambda x: x[chunk.row_B], rows)
    count_B = chunk.count_B
    known_B = jnp.take_along_axis(chunk.token_Bt, count_B[:, None], axis=1)[:, 0]
    newest_B = jnp.where(chunk.known_B > count_B, known_B, chosen_B)
    recent_Bt = jnp.concatenate([old.recent_Bw[:, :-1], chunk.token_Bt], 1)
    recent_Bt = _put(recent_Bt, window + count_B, newest_B)
    found = Rows(
        chunk.start_B + count_B,
        _window(recent_Bt, count_B, window + 1),
        _window(jnp.concatenate([old.hidden_BWD, h_BTD], 1), count_B, window),
        jnp.minimum(jnp.where(chunk.first_B, 0, old.held_B) + count_B, window),
    )
    row_B = jnp.where(count_B > 0, chunk.row_B, len(rows.position_B))
    return jax.tree.map(lambda x, new: x.at[row_B].set(new, mode="drop"), rows, found)


# --- steps ---------------------------------------------------------------------------------------


def go_on(
    weights: Weights,
    state: State,
    lease: Lease,
    active_B: jax.Array,
    count: jax.Array,
    experts: Experts,
    top: int = 0,
) -> tuple[State, Verdict]:
    """`count` steps of the first B rows of the state. The verdicts' leading dimension is
    `MOST_STEPS`, of which the first `count` are used; rows that are not active, or have come to
    their limit, take 0 tokens.

    The weights pass a barrier with the positions at each step, or XLA:CPU would take work on them
    out of the loop: whole experts in float32 for bfloat16 weights, at every call.
    """
    b = len(active_B)

    def step(i: jax.Array, carry: Any) -> Any:
        state, verdicts = carry
        kept, rows = lax.optimization_barrier((weights, state.rows))
        state, verdict = one_step(kept, state._replace(rows=rows), lease, active_B)
        return state, jax.tree.map(lambda all_N, x: all_N.at[i].set(x), verdicts, verdict)

    rest = state.rows
    state = state._replace(rows=jax.tree.map(lambda x: x[:b], state.rows))
    one_step = partial(_one_step, experts=experts, top=top)
    _, like = jax.eval_shape(one_step, weights, state, lease, active_B)
    verdicts = jax.tree.map(lambda x: jnp.zeros((MOST_STEPS, *x.shape), x.dtype), like)
    verdicts = varying_like(verdicts, active_B)
    state, verdicts = lax.fori_loop(0, count, step, (state, verdicts))
    rows = jax.tree.map(lambda x, new: x.at[:b].set(new), rest, state.rows)
    return state._replace(rows=rows), verdicts


def _one_step(
    weights: Weights,
    state: State,
    lease: Lease,
    active_B: jax.Array,
    experts: Experts,
    top: int,
) -> tuple[State, Verdict]:
    rows, layers = state.rows, len(weights.layers)
    # The newest token's own place is within the limit, and so must the next one's be.
    allowed_B = jnp.clip(lease.limit_B - 2 - rows.position_B, 0, len(weights.depths))
    live_B = active_B & (rows.position_B + 1 < lease.limit_B)
    drafted = _drafts(weights, state, lease, live_B, experts)
    token_BJ = jnp.concatenate([rows.recent_Bw[:, -1:], drafted.token_BD], 1)
    place_1J = jnp.arange(token_BJ.shape[1])[None]
    live_BJ = live_B[:, None] & (place_1J <= allowed_B[:, None])
    position_BJ = rows.position_B[:, None] + place_1J
    part = Part(token_BJ, position_BJ, live_BJ, rows.position_B, lease.table_BY)
    (way,) = forward(weights, state.pools[:layers], [part], experts)
    logits_BJV = weights.rest.logits(way.hidden_BTD)
    verdict = verify(
        logits_BJV,
        drafted.token_BD,
        drafted.logits_BDV,
        allowed_B,
        rows.position_B,
        lease.how,
        top,
    )
    verdict = verdict._replace(taken_B=jnp.where(live_B, verdict.taken_B, 0))
    state = state._replace(rows=_after_step(rows, verdict, way.hidden_BTD))
    writes = [Write(part, lease, way), *drafted.writes]
    return _written(weights, state, writes, [verdict]), verdict


class _Drafted(NamedTuple):
    token_BD: jax.Array
    logits_BDV: jax.Array
    writes: list["Write"]


def _drafts(
    weights: Weights, state: State, lease: Lease, live_B: jax.Array, experts: Experts
) -> _Drafted:
    """Of all MTP modules, one after the other."""
    rows, layers = state.rows, len(weights.layers)
    b, window = len(rows.position_B), rows.hidden_BWD.shape[1]
    place_1W = jnp.arange(window)[None]
    held_BW = live_B[:, None] & (place_1W >= window - rows.held_B[:, None])
    position_BW = rows.position_B[:, None] - window + place_1W
    before_B = rows.position_B - rows.held_B
    token_Bw, h_BWD = rows.recent_Bw, rows.hidden_BWD
    vocab = weights.rest.cfg.vocab_size
    logits, writes = [], []
    for k, depth in enumerate(weights.depths, start=1):
        part = Part(token_Bw[:, k : k + window], position_BW, held_BW, before_B, lease.table_BY)
        pool = state.pools[layers + k - 1]
        way = through_depth(weights, depth, pool, part, h_BWD, experts)
        h_BWD = way.hidden_BTD
        logits.append(weights.rest.logits(h_BWD[:, -1:]))
        # The position before the newest token's has seen k - 1 drafts, and is k places behind.
        position_B = rows.position_B + k - 1
        draft_B = draw_draft(logits[-1][:, 0], position_B, lease.how)
        token_Bw = jnp.concatenate([token_Bw, draft_B[:, None]], 1)
        writes.append(Write(part, lease, way, k))
    logits_BDV = jnp.concatenate(
        logits or [jnp.zeros((b, 0, vocab), weights.rest.embed_VD.dtype)], 1
    )
    return _Drafted(token_Bw[:, window + 1 :], logits_BDV, writes)


def _after_step(rows: Rows, verdict: Verdict, h_BJD: jax.Array) -> Rows:
    window, taken_B = rows.hidden_BWD.shape[1], verdict.taken_B
    return Rows(
        rows.position_B + taken_B,
        _window(jnp.concatenate([rows.recent_Bw, verdict.token_BJ], 1), taken_B, window + 1),
        _window(jnp.concatenate([rows.hidden_BWD, h_BJD], 1), taken_B, window),
        jnp.minimum(rows.held_B + taken_B, window),
    )


# --- both ----------------------------------------------------------------------------------------


def _window(x_Bt: jax.Array, start_B: jax.Array, size: int) -> jax.Array:
    """`size` columns of each row, from its `start` on."""
    return jax.vmap(lambda x, start: lax.dynamic_slice_in_dim(x, start, size))(x_Bt, start_B)


def _put(x_Bt: jax.Array, place_B: jax.Array, value_B: jax.Array) -> jax.Array:
    return jax.vmap(lambda x, place, value: x.at[place].set(value))(x_Bt, place_B, value_B)


class Write(NamedTuple):
    """What has passed the layers from the main model's first on, or only MTP module `depth`."""

    part: Part
    lease: Lease
    passed: Passed
    depth: int = 0


def _written(
    weights: Weights, state: State, writes: Sequence[Write], verdicts: Sequence[Verdict]
) -> State:
    """The latents in the pools, and the loads added.

    Places depend on the choice of tokens (no id is negative), so all layers have read a pool before
    it is written. Else XLA:CPU would copy it, once for every reader.
    """
    pools, load_LE = list(state.pools), state.load_LE
    chosen = sum(verdict.token_BJ[0, 0] for verdict in verdicts)
    for write in writes:
        part, lease = write.part, write.lease
        position_BT = jnp.where(chosen < 0, 0, part.position_BT)
        live_BT = part.live_BT & (part.position_BT >= lease.own_from_B[:, None])
        first = len(weights.layers) + write.depth - 1 if write.depth else 0
        for i, own in enumerate(write.passed.latents, start=first):
            pools[i] = written(pools[i], own, lease.table_BY, position_BT, live_BT)
        if write.passed.loads:
            last = len(load_LE) - len(weights.depths) + write.depth
            first = last - 1 if write.depth else 0
            load_LE = load_LE.at[first : first + len(write.passed.loads)].add(
                jnp.stack(write.passed.loads)
            )
    return state._replace(pools=tuple(pools), load_LE=load_LE)
