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
from dsv3_jax.quant.recipes import recipe_of
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


Validate = Callable[[TrainState, Rows, Sequence[int]], Validation]

# A batch's rows of this process, on the host -> nats, labels, bytes of all of it.
Sums = Callable[[Batch], tuple[jax.Array, jax.Array, jax.Array]]


def make_validate(
    graphdef: nnx.GraphDef,
    cfg: RunConfig,
    byte_lengths_V: np.ndarray,
    sharding: RunSharding = ONE_DEVICE,
) -> Validate:
    """`validate(state, rows, indices)`; compiled once for batches as large as a training micro-
    batch.
    """

    def sums(params, biases, batch: Batch):
        params = with_quantized_weights(sharding.gather(params), recipe_of(cfg.quant))
        model = nnx.merge(graphdef, params, biases)
        valid_BT, dtype = batch.labels_BT >= 0, jnp.dtype(cfg.train.dtype)
        h_BTD, _ = model.hidden(
            batch.tokens_BT,
            valid_BT,
            dtype,
            segments_BT=batch.segments_BT,
            plan=sharding.plan,
        )
        nats = cross_entropy(h_BTD, model.head(), batch.labels_BT)
        return sharding.sum((nats, *counted(batch.labels_BT, byte_lengths_V)))

    specs = sharding.param_specs(abstract_state(cfg)[1].params)
    sums = jax.jit(sharding.per_device(sums, (specs, WHOLE, ROWS), WHOLE))

    def of(state: TrainState) -> Sums:
        def of_batch(batch: Batch) -> tuple[jax.Array, ...]:
            rows = cfg.train.rows // cfg.train.microbatches
            return sums(state.params, state.biases, sharding.put_rows(batch, rows))

        return of_batch

    return validating(cfg, of, sharding.own_rows)


def counted(labels_BT: jax.Array, byte_lengths_V: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Labels that count, and the bytes that they stand for."""
    valid_BT, lengths_V = labels_BT >= 0, jnp.asarray(byte_lengths_V, jnp.int32)
    num_bytes = jnp.where(valid_BT, lengths_V[labels_BT], 0).sum(dtype=jnp.int32)
    return valid_BT.sum(dtype=jnp.int32), num_bytes


def validating(
    cfg: RunConfig,
    sums_of: Callable[[TrainState], Sums],
    own_rows: Callable[[int], Sequence[int]],
) -> Validate:
    """`validate(state, rows, indices)` from what gives the sums of a batch, of which this process
    makes its own rows.
    """
    size = cfg.train.rows // cfg.train.microbatches
    own = np.array(own_rows(size))

    def validate(state: TrainState, rows: Rows, indices: Sequence[int]) -> Validation:
        nats, tokens, num_bytes, sums = 0.0, 0, 0, sums_of(state)
        for start in range(0, len(indices), size):
            chosen = indices[start : start + size]
            last = len(chosen) - 1
            batch = stack([rows[chosen[min(i, last)]] for i in own])
            for x in batch:
                if x is not None:
                    x[own > last] = 0  # the last batch is filled up
            batch.labels_BT[own > last] = -1
            found = sums(batch)
            nats += float(found[0])
            tokens += int(found[1])
            num_bytes += int(found[2])
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
