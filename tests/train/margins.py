"""How far a model's choice of experts is from another one: whether rounding could change it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import ModelConfig, TrainConfig
from dsv3_jax.data.loader import Batch
from dsv3_jax.model import router
from dsv3_jax.train.loss import loss
from dsv3_jax.train.step import TrainState
from tests.shapes import compiled


def routing_margin(
    model: ModelConfig, graphdef: nnx.GraphDef, state: TrainState, batch: Batch, train: TrainConfig
) -> float:
    """The smallest distance, on one device, between a score, of experts or groups, that is among
    the best and one that is not.
    """
    margins, choose = [], router.choose_experts

    def note(biased_BTE):
        biased_BTE = np.asarray(biased_BTE)
        grouped = np.sort(biased_BTE.reshape(*biased_BTE.shape[:2], model.num_groups, -1), -1)
        scores = grouped[..., -2:].sum(-1)
        best = np.argsort(scores, -1)[..., -model.num_kept_groups :]
        among = np.take_along_axis(grouped, best[..., None], -2)
        among = among.reshape(*best.shape[:2], -1)
        for ranked, kept in ((scores, best.shape[-1]), (among, model.experts_per_token)):
            ranked = np.sort(ranked, -1)
            margins.append((ranked[..., -kept] - ranked[..., -kept - 1]).min())

    def look(biased_BTE, cfg):
        jax.debug.callback(note, biased_BTE)
        return choose(biased_BTE, cfg)

    def run(state, batch):
        whole = nnx.merge(graphdef, state.params, state.biases)
        return loss(whole, batch, jnp.int32(1), jnp.float32(0.3), train)[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router, "choose_experts", look)
        compiled(run)(state, batch).block_until_ready()
    jax.effects_barrier()
    assert len(margins) == 2 * (model.num_moe_layers + model.mtp_depth)
    return min(margins)
