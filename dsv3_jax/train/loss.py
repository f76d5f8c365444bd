"""The training loss: main + MTP + balance (report Eq. 17, 24, 25)."""

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
    up to the step's mean; MTP divides by it too, as Eq. 24 divides by T. Balance is the mean over
    the step's rows, of which this micro-batch holds `row_share`, summed over MoE layers. `slot_B`
    are zeros whose gradient tells the rows whose gradient is not finite. With a `plan`, experts are
    spread over devices and all values are this device's.
    """
    tokens_BT, labels_BT, segments_BT = batch
    dtype = jnp.dtype(cfg.dtype)
    valid_BT = labels_BT >= 0
    h_BTD, stats = model.hidden(tokens_BT, valid_BT, dtype, cfg.remat, segments_BT, slot_B, plan)
    main = cross_entropy(h_BTD, model.head(), labels_BT) / valid_tokens
    mtp = jnp.zeros_like(main)
    loads, balances, traffic = [stats.load_E], [stats.balance.sum()], [stats.traffic]
    depths = model.mtp_hidden(h_BTD, tokens_BT, valid_BT, cfg.remat, segments_BT, plan)
    for k, (h_k, stats_k) in enumerate(depths, start=1):
        counted_BT = valid_BT & same_segment(segments_BT, k)
        labels_k = jnp.where(counted_BT, shift_left(labels_BT, k, fill=-1), -1)
        mtp += cross_entropy(h_k, model.head(), labels_k) / (valid_tokens * len(model.mtp))
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
    return main + mtp_weight * mtp + cfg.balance_weight * parts.balance, parts
