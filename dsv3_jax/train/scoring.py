"""log p of every label under a state's weights, on the mesh and by the recipe that it is trained
with: what reinforcement learning compares policies by (report 5.2.2).
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from dsv3_jax.config import RunConfig
from dsv3_jax.data.loader import Batch
from dsv3_jax.model.cross_entropy import log_probs
from dsv3_jax.parallel.sequence import RowPlaces
from dsv3_jax.quant.recipes import recipe_of
from dsv3_jax.train.quantized_weights import with_quantized_weights
from dsv3_jax.train.sharding import ONE_DEVICE, ROWS, WHOLE, RunSharding
from dsv3_jax.train.step import TrainState, abstract_state

# A state and a batch of a multiple of a micro-batch's rows, all of it in every process -> log p of
# each label, 0 where it is -1; float32 or wider [B, T] on the host.
Scores = Callable[[TrainState, Batch], np.ndarray]


def make_scores(
    graphdef: nnx.GraphDef, cfg: RunConfig, sharding: RunSharding = ONE_DEVICE
) -> Scores:
    """Compiled once, for a micro-batch."""

    def body(params: nnx.State, biases: nnx.State, batch: Batch) -> jax.Array:
        params = with_quantized_weights(sharding.gather(params), recipe_of(cfg.quant))
        model = nnx.merge(graphdef, params, biases)
        h_BTD, _ = model.hidden(
            batch.tokens_BT,
            batch.labels_BT >= 0,
            jnp.dtype(cfg.train.dtype),
            segments_BT=batch.segments_BT,
            plan=sharding.plan,
        )
        return log_probs(h_BTD, model.head(), batch.labels_BT)

    specs = sharding.param_specs(abstract_state(cfg)[1].params)
    on_rows = sharding.per_device(body, (specs, WHOLE, ROWS), ROWS)

    @jax.jit
    def program(params: nnx.State, biases: nnx.State, batch: Batch) -> jax.Array:
        found_BT = on_rows(params, biases, batch)
        if sharding.mesh is None:
            return found_BT
        return jax.sharding.reshard(found_BT, NamedSharding(sharding.mesh, WHOLE))

    def of(state: TrainState) -> Callable[[Batch], jax.Array]:
        run, rows = partial(program, state.params, state.biases), rows_of_microbatch(cfg)
        return lambda batch: run(sharding.put_rows(batch, rows))

    return scoring(cfg, of, sharding.own_rows, sharding.places)


def rows_of_microbatch(cfg: RunConfig) -> int:
    """On all devices together."""
    return cfg.train.rows // cfg.train.microbatches


def scoring(
    cfg: RunConfig,
    of_state: Callable[[TrainState], Callable[[Batch], jax.Array]],
    own_rows: Callable[[int], Sequence[int]],
    places: RowPlaces,
) -> Scores:
    """From what gives the log-probabilities of this process's rows of a micro-batch, in the order
    of devices.
    """
    size = rows_of_microbatch(cfg)
    own = np.array(own_rows(size))

    def scores(state: TrainState, batch: Batch) -> np.ndarray:
        of_batch, found = of_state(state), []
        for start in range(0, len(batch.labels_BT), size):
            rows = start + own
            arrays = (None if x is None else x[rows] for x in batch._replace(weights_BT=None))
            parts_BT = np.asarray(of_batch(Batch(*arrays)))
            found.append(places.joined(parts_BT, size))
        return np.concatenate(found)

    return scores
