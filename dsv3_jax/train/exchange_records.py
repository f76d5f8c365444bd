"""What a step's exchanges between devices took, for metrics and the page."""

from typing import Any

import jax.numpy as jnp

from dsv3_jax.config import RunConfig
from dsv3_jax.parallel.wire import PLAIN, row_bytes, wire_of_rules
from dsv3_jax.quant.recipes import RECIPES
from dsv3_jax.train.step import Exchanged


def exchange_entry(cfg: RunConfig, exchanged: Exchanged) -> dict[str, Any]:
    """Of one step, whose metrics are on the host; means over layers.

    `tokens_per_device` is the fullest device's share of token copies over the mean; `rounds` and
    `most_rounds` are of a micro-batch, 1 where all found room in the first; `node_bytes` and
    `local_bytes` are what the rows of hop 1 and hop 2 take, forward and backward, there and back,
    on all devices together, without empty rows of buckets and without what tells of the routing.
    """
    total, micro = exchanged.total, cfg.train.microbatches
    mesh, copies_L = cfg.mesh, total.received / cfg.mesh.token_shards
    per_row = bytes_of_row(cfg)
    return {
        "tokens_per_device": float((exchanged.most_received_L / copies_L).mean()),
        "rounds": float(total.rounds.mean() / mesh.token_shards / micro),
        "most_rounds": float(exchanged.most_rounds_L.max() / micro),
        "crossing_share": float(total.crossing_tokens.sum() / total.tokens.sum()),
        "crossings_per_token": float(total.crossings.sum() / total.tokens.sum()),
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
