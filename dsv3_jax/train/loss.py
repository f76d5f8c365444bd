"""The training loss: main + MTP + balance (report Eq. 17, 24, 25)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.config import TrainConfig
from dsv3_jax.data.loader import Batch
from dsv3_jax.model.cross_entropy import cross_entropy
from dsv3_jax.model.mtp import same_segment, shift_left
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.parallel.buckets import ExchangePlan
from dsv3_jax.parallel.dispatch import Traffic


class LossParts(NamedTuple):
    """Summands of the loss before their weights, and load [layers, E] of every router, MTP's
    last.
    """

    main: jax.Array
    mtp: jax.Array
    balance: jax.Array
    load_LE: jax.Array
    traffic: Traffic | None = None
    """Of every exchange with experts on other devices [L]"""


class StageOutput(NamedTuple):
    """What a stage hands on, what it adds to the loss, and the parts of that."""

    h_BTD: jax.Array
    """Behind its last layer; normed behind the head, and behind MTP that depth's"""
    total: jax.Array
    parts: LossParts


# (hidden states, head [D, V], labels, their weights, d loss / d result) -> sum of -log p, as
# `cross_entropy`
Nats = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array], jax.Array]


def _nats(h_BTD, head_DV, labels_BT, weights_BT, share) -> jax.Array:
    del share
    return cross_entropy(h_BTD, head_DV, labels_BT, weights_BT)


def loss(
    model: DeepSeekV3,
    batch: Batch,
    valid_tokens: jax.Array,
    mtp_weight: jax.Array,
    cfg: TrainConfig,
    row_share: float = 1.0,
    slot_B: jax.Array | None = None,
    plan: ExchangePlan | None = None,
) -> tuple[jax.Array, LossParts]:
    """Loss of one micro-batch.

    `valid_tokens` is the count of labels in the whole step, so that micro-batches and devices add
    up to the step's mean; MTP divides by it too, as Eq. 24 divides by T. A label's weight, if there
    is one, counts wherever it is predicted. Balance is the mean over
    the step's rows, of which this micro-batch holds `row_share`, summed over MoE layers. `slot_B`
    are zeros whose gradient tells the rows whose gradient is not finite. With a `plan`, experts are
    spread over devices and all values are this device's; `row_share` is one device's, also of those
    that share a row.
    """
    args = batch, valid_tokens, mtp_weight, cfg, row_share, slot_B, plan
    whole = stage_loss(model, None, *args)
    return whole.total, whole.parts


def stage_loss(
    model: DeepSeekV3,
    x_BTD: jax.Array | None,
    batch: Batch,
    valid_tokens: jax.Array,
    mtp_weight: jax.Array,
    cfg: TrainConfig,
    row_share: float = 1.0,
    slot_B: jax.Array | None = None,
    plan: ExchangePlan | None = None,
    nats: Nats = _nats,
) -> StageOutput:
    """The part of `loss` that a stage adds, from what the stage before has handed on; the first
    one, where tokens enter, takes None and `slot_B`. `nats` gives the cross-entropy.
    """
    tokens_BT, labels_BT, segments_BT, weights_BT = batch
    cut, valid_BT, shards = model.cut, labels_BT >= 0, plan and plan.rows
    if cut.embed:
        x_BTD = model.embed(tokens_BT, jnp.dtype(cfg.dtype), slot_B)
    x_BTD, stats = model.layers(x_BTD, tokens_BT, valid_BT, cfg.remat, segments_BT, plan)
    main = mtp = jnp.zeros_like(stats.balance, shape=())
    if cut.head:
        x_BTD, share = model.normed(x_BTD), jnp.ones_like(main) / valid_tokens
        main = nats(x_BTD, model.head(), labels_BT, weights_BT, share) / valid_tokens
    loads, balances, traffic = [stats.load_E], [stats.balance.sum()], [stats.traffic]
    depths = model.mtp_hidden(x_BTD, tokens_BT, valid_BT, cfg.remat, segments_BT, plan)
    for k, (x_BTD, stats_k) in enumerate(depths, start=cut.first_mtp + 1):
        counted_BT = valid_BT & same_segment(segments_BT, k, shards)
        labels_k = jnp.where(counted_BT, shift_left(labels_BT, k, -1, shards), -1)
        weights_k = None if weights_BT is None else shift_left(weights_BT, k, 0, shards)
        tokens = valid_tokens * model.cfg.mtp_depth
        share = jnp.asarray(mtp_weight, main.dtype) / tokens
        mtp += nats(x_BTD, model.head(), labels_k, weights_k, share) / tokens
        loads.append(stats_k.load_E[None])
        balances.append(stats_k.balance)
        traffic.append(jax.tree.map(jnp.atleast_1d, stats_k.traffic))
    traffic = [layers for layers in traffic if layers is not None]
    parts = LossParts(
        main,
        mtp,
        sum(balances) * row_share,
        jnp.concatenate(loads),
        jax.tree.map(lambda *layers: jnp.concatenate(layers), *traffic) if traffic else None,
    )
    total = main + mtp_weight * mtp + cfg.balance_weight * parts.balance
    return StageOutput(x_BTD, total, parts)
