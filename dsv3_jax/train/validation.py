"""Loss on held-out rows, in nats per token and in bits per byte, which no choice of tokenizer can
flatter.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.config import RunConfig
from dsv3_jax.data.loader import Batch, stack
from dsv3_jax.data.packing import Rows
from dsv3_jax.model.cross_entropy import cross_entropy
from dsv3_jax.train.quantized_weights import with_quantized_weights
from dsv3_jax.train.sharding import ONE_DEVICE, ROWS, WHOLE, RunSharding
from dsv3_jax.train.step import TrainState, abstract_state


class Validation(NamedTuple):
    """Over the labels of some rows: mean loss in nats, bits per byte of their text, number of
    bytes and rows.
    """

    loss: float
    bits_per_byte: float
    bytes: int
    rows: int


def make_validate(
    graphdef: nnx.GraphDef,
    cfg: RunConfig,
    byte_lengths_V: np.ndarray,
    sharding: RunSharding = ONE_DEVICE,
) -> Callable[[TrainState, Rows, Sequence[int]], Validation]:
    """`validate(state, rows, indices)`; compiled once for batches as large as a training micro-
    batch.
    """
    size = cfg.train.rows // cfg.train.microbatches

    def nll(params, biases, batch: Batch):
        params = with_quantized_weights(sharding.gather(params), cfg.quant.recipe)
        model = nnx.merge(graphdef, params, biases)
        valid_BT, dtype = batch.labels_BT >= 0, jnp.dtype(cfg.train.dtype)
        h_BTD, _ = model.hidden(
            batch.tokens_BT,
            valid_BT,
            dtype,
            segments_BT=batch.segments_BT,
            plan=sharding.plan,
        )
        return sharding.sum(cross_entropy(h_BTD, model.head(), batch.labels_BT))

    specs = sharding.param_specs(abstract_state(cfg)[1].params)
    nll = jax.jit(sharding.per_device(nll, (specs, WHOLE, ROWS), WHOLE))

    def validate(state: TrainState, rows: Rows, indices: Sequence[int]) -> Validation:
        nats, tokens, num_bytes = 0.0, 0, 0
        for start in range(0, len(indices), size):
            chosen = indices[start : start + size]
            batch = stack([rows[index] for index in chosen])
            absent = ((0, size - len(chosen)), (0, 0))  # the last batch is filled up
            batch = Batch(*(x if x is None else np.pad(x, absent) for x in batch))
            batch.labels_BT[len(chosen) :] = -1
            nats += float(nll(state.params, state.biases, sharding.put_rows(batch)))
            counted = batch.labels_BT[batch.labels_BT >= 0]
            tokens += counted.size
            num_bytes += int(byte_lengths_V[counted].sum())
        bits = nats / math.log(2)
        return Validation(nats / max(tokens, 1), bits / max(num_bytes, 1), num_bytes, len(indices))

    return validate


def spread(total: int, wanted: int) -> list[int]:
    """`wanted` indices evenly over 0..total-1, or all of them."""
    count = min(total, wanted)
    return [i * total // count for i in range(count)]


def text_of(rows: Rows, token_bytes: Sequence[bytes]) -> bytes:
    """The bytes that the labels of all rows stand for."""
    return b"".join(
        token_bytes[i] for row in rows for i in row.labels_T[row.labels_T >= 0].tolist()
    )
