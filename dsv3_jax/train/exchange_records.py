"""What a step's exchanges between devices took, for metrics and the page."""

from typing import Any

import jax.numpy as jnp

from dsv3_jax.config import RunConfig
from dsv3_jax.parallel.wire import PLAIN, row_bytes, wire_of_rules
from dsv3_jax.quant.recipes import RECIPES
from dsv3_jax.train.step import StepTraffic


def exchange_entry(cfg: RunConfig, rows: int, traffic: StepTraffic) -> dict[str, Any]:
    """Of one step of so many rows, whose metrics are on the host; means over layers and
    micro-batches.

    `device_imbalance` is the fullest device's share of token copies over the mean; `rounds` is 1
    where all found room in the first, `most_rounds` the fullest layer's; `node_bytes` and
    `local_bytes` are what the rows of hop 1 and hop 2 take, forward and backward, there and back,
    on all devices together: without empty rows of buckets, what tells of the routing, and what
    recomputation (`train.remat full`, rounds beyond the first) sends again.
    """
    total, model, shards = traffic.total, cfg.model, cfg.mesh.token_shards
    micro = rows * cfg.train.microbatches // cfg.train.rows
    tokens, per_row = total.received.sum() / model.experts_per_token, bytes_of_row(cfg)
    return {
        "device_imbalance": float((traffic.most_received_L / (total.received / shards)).mean()),
        "rounds": float(total.rounds.mean() / shards / micro),
        "most_rounds": float(traffic.most_rounds_L.max() / micro),
        "crossing_share": float(total.crossing_tokens.sum() / tokens),
        "crossings_per_token": float(total.crossings.sum() / tokens),
        "node_bytes": int(total.crossings.sum()) * per_row,
        "local_bytes": int(total.local_copies.sum()) * per_row,
    }


def bytes_of_row(cfg: RunConfig) -> int:
    """That one row takes over one hop in a step: input there, result back; result's gradient there,
    input's gradient back.
    """
    recipe, width = RECIPES[cfg.quant.recipe], cfg.model.d_model
    wire = PLAIN
    if recipe:
        wire = wire_of_rules(recipe["dispatched"], recipe["expert_after_swiglu"])
    itemsize = jnp.dtype(cfg.train.dtype).itemsize
    return sum(row_bytes(operand, width, itemsize) for operand in (*wire, None, None))
