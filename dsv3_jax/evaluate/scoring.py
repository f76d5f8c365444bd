"""Log-likelihoods of given tokens, batched by length (report 4.4: perplexity scoring).

Rows of a batch are filled up to one of few lengths, as a program is compiled for each. Logits are
made for so many positions at a time that they stay small, and not at all where nothing is asked.
Rows of the same tokens are computed once, however many labels they are asked for: the choices A to
D of a question are one row.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import MeshConfig
from dsv3_jax.inference import programs
from dsv3_jax.inference.programs import placed, weight_specs
from dsv3_jax.inference.served_experts import make_serving_plan, served_experts
from dsv3_jax.inference.settings import bucket, buckets
from dsv3_jax.inference.weights import Weights
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.yarn import rope_table
from dsv3_jax.parallel.buckets import ExchangePlan
from dsv3_jax.parallel.mesh import TOKEN_AXES, varying_like
from dsv3_jax.quant.wide import wide_einsum

SHORTEST = 16  # shorter rows are filled up to it
MOST_LOGITS = 2**25  # of a device at a time, 134 MB in float32
_ROWS = PartitionSpec(TOKEN_AXES)
_ASKED = buckets(4**12)  # labels behind a token: 1, 4, 16 ...


class Row(NamedTuple):
    """Tokens that the model reads, and what it is asked for behind each of them, -1: nothing."""

    tokens: Sequence[int]
    labels: Sequence[int]


class Scored(NamedTuple):
    """Natural logarithms of the probabilities of a row's labels, one after the other, in float64;
    and whether each label is the likeliest token.
    """

    logprob_N: np.ndarray
    likeliest: bool


class Scorer:
    """Scores rows with one model's weights, on one device or on a mesh."""

    def __init__(self, weights: Weights, mesh: Mesh | None = None, rows: int = 16) -> None:
        """`rows` of a batch are one device's. ValueError for a mesh that cannot share experts."""
        cfg = weights.rest.cfg
        shape = MeshConfig() if mesh is None else MeshConfig(**dict(mesh.shape))
        self.plan = make_serving_plan(shape, cfg, cfg.num_experts, grouped=True)
        self.weights, self.mesh = placed(weights, mesh), mesh
        self.longest, self.rows = cfg.max_length, rows * shape.token_shards
        self._lengths = lengths(self.longest)
        self._compiled: dict[tuple[int, ...], Callable] = {}

    def score(
        self, rows: Sequence[Row], told: Callable[[int], None] = lambda done: None
    ) -> list[Scored]:
        """In the order of the rows; `told` hears after each batch how many are done.

        ValueError for a row that is longer than the model, or has no token.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, row in enumerate(rows):
            if not 1 <= len(row.tokens) <= self.longest or len(row.tokens) != len(row.labels):
                raise ValueError(
                    f"a row of {len(row.tokens)} tokens and {len(row.labels)} labels; allowed: as "
                    f"many of both, 1 to model.max_length = {self.longest}"
                )
            groups.setdefault(tuple(row.tokens), []).append(place)
        # The longest first: if memory is too small, it shows at once.
        waiting = sorted(groups.items(), key=lambda item: -len(item[0]))
        found: dict[int, Scored] = {}
        begin = 0
        while begin < len(waiting):
            length = self._length(waiting[begin])
            batch = waiting[begin : begin + self.rows]
            batch = [item for item in batch if self._length(item) == length]
            begin += len(batch)
            found |= self._batch(rows, batch, length)
            told(len(found))
        return [found[place] for place in range(len(rows))]

    def _length(self, item: tuple[tuple[int, ...], list[int]]) -> int:
        return bucket(len(item[0]), self._lengths)

    def _batch(
        self, rows: Sequence[Row], batch: Sequence[tuple[tuple[int, ...], list[int]]], length: int
    ) -> dict[int, Scored]:
        asked = bucket(max(len(places) for _, places in batch), _ASKED)
        tokens_BT = np.zeros((self.rows, length), np.int32)
        labels_BTN = np.full((self.rows, length, asked), -1, np.int32)
        count_B = np.zeros(self.rows, np.int32)
        for b, (tokens, places) in enumerate(batch):
            count_B[b] = len(tokens)
            tokens_BT[b, : len(tokens)] = tokens
            for n, place in enumerate(places):
                labels_BTN[b, : len(tokens), n] = rows[place].labels
        logprob_BTN, likeliest_BTN = self._run(tokens_BT, count_B, labels_BTN)
        scored = {}
        for b, (_, places) in enumerate(batch):
            for n, place in enumerate(places):
                asked_T = labels_BTN[b, :, n] >= 0
                logprob_N = logprob_BTN[b, asked_T, n].astype(np.float64)
                scored[place] = Scored(logprob_N, bool(likeliest_BTN[b, asked_T, n].all()))
        return scored

    def _run(self, *args: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        key = tuple(args[-1].shape)
        if self.mesh is not None:
            args = jax.device_put(args, NamedSharding(self.mesh, _ROWS))
        if key not in self._compiled:
            body = partial(likelihoods, plan=self.plan)
            if self.mesh is not None:
                specs = (weight_specs(self.weights), _ROWS, _ROWS, _ROWS)
                body = jax.shard_map(body, mesh=self.mesh, in_specs=specs, out_specs=_ROWS)
            lowered = jax.jit(body).lower(self.weights, *args)
            self._compiled[key] = lowered.compile(programs.COMPILER_OPTIONS or None)
        return jax.tree.map(np.asarray, self._compiled[key](self.weights, *args))


def lengths(longest: int) -> tuple[int, ...]:
    """That rows are filled up to: from `SHORTEST` on two in each doubling, and `longest` itself."""
    sizes, size = [], SHORTEST
    while size < longest:
        sizes += [size, size * 3 // 2]
        size *= 2
    return (*(size for size in sizes if size < longest), longest)


def likelihoods(
    weights: Weights,
    tokens_BT: jax.Array,
    count_B: jax.Array,
    labels_BTN: jax.Array,
    plan: ExchangePlan | None = None,
) -> tuple[jax.Array, jax.Array]:
    """log p of each label behind its token, at least float32, and whether it is the likeliest.

    Of a row's T tokens the first `count` are there. N labels are asked for behind each; -1 gives 0
    and False. With a `plan`, within a `shard_map`.
    """
    h_BTD = hidden(weights, tokens_BT, count_B, plan)
    rest, asked = weights.rest, labels_BTN.shape[-1]
    head_DV = rest.head().astype(h_BTD.dtype)
    size = max(MOST_LOGITS // head_DV.shape[1], 1)
    h_XD, labels_XN = h_BTD.reshape(-1, h_BTD.shape[-1]), labels_BTN.reshape(-1, asked)
    size = min(size, len(h_XD))
    pad = -len(h_XD) % size
    h_MXD = jnp.pad(h_XD, ((0, pad), (0, 0))).reshape(-1, size, h_XD.shape[-1])
    labels_MXN = jnp.pad(labels_XN, ((0, pad), (0, 0)), constant_values=-1)
    labels_MXN = labels_MXN.reshape(-1, size, asked)

    def chunk(args):
        h_XD, labels_XN = args
        like = jax.eval_shape(_of_chunk, h_XD, head_DV, labels_XN)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        nothing = varying_like(nothing, h_XD)
        return lax.cond(
            (labels_XN >= 0).any(), lambda: _of_chunk(h_XD, head_DV, labels_XN), lambda: nothing
        )

    found_MXN = lax.map(chunk, (h_MXD, labels_MXN))
    return jax.tree.map(
        lambda x: x.reshape(-1, asked)[: labels_XN.shape[0]].reshape(labels_BTN.shape), found_MXN
    )


def hidden(
    weights: Weights, tokens_BT: jax.Array, count_B: jax.Array, plan: ExchangePlan | None = None
) -> jax.Array:
    """Hidden states behind the last norm [B, T, D]; tokens that are not there go to no expert."""
    rest = weights.rest
    x_BTD = rest.embed(tokens_BT)
    place_1T = jnp.arange(tokens_BT.shape[1])[None]
    live_BT = place_1T < count_B[:, None]
    rope_BTR = rope_table(rest.cfg, place_1T, x_BTD.dtype)
    for layer in weights.layers:
        block = layer.block
        x_BTD += block.mla(rms_norm(x_BTD, block.attention_norm_D[...], block.eps), rope_BTR)
        normed_BTD = rms_norm(x_BTD, block.ffn_norm_D[...], block.eps)
        if hasattr(block, "dense"):
            x_BTD += block.dense(normed_BTD)
        else:
            x_BTD += served_experts(block.moe, normed_BTD, live_BT, plan)[0]
    return rest.normed(x_BTD)


def _of_chunk(
    h_XD: jax.Array, head_DV: jax.Array, labels_XN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    logits_XV = wide_einsum("xd,dv->xv", h_XD, head_DV)
    total_X1 = jax.nn.logsumexp(logits_XV, axis=-1, keepdims=True)
    logit_XN = jnp.take_along_axis(logits_XV, jnp.maximum(labels_XN, 0), axis=-1)
    counts_XN = labels_XN >= 0
    best_X1 = logits_XV.argmax(-1, keepdims=True)
    return jnp.where(counts_XN, logit_XN - total_X1, 0), counts_XN & (labels_XN == best_X1)
