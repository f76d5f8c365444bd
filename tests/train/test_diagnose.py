"""The layer in which numbers stop being finite is named: forward, backward, MTP, weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import TrainConfig
from dsv3_jax.data.loader import Batch
from dsv3_jax.model import attention as attention_module
from dsv3_jax.model import mla
from dsv3_jax.model.router import RouterBias
from dsv3_jax.train.diagnose import first_bad_layer
from dsv3_jax.train.step import TrainState
from tests.runs import jax_option
from tests.shapes import random_model, random_tokens, tiny_model

CFG = tiny_model(num_layers=3)


def said(change=None) -> str:
    """Of a random model whose parameter of this path was replaced by a value."""
    graphdef, params, biases = nnx.split(random_model(CFG), nnx.Param, RouterBias)
    if change:
        path, value = change
        flat = dict(nnx.to_flat_state(params))
        flat[path] = flat[path].replace(jnp.full_like(flat[path][...], value))
        params = nnx.from_flat_state(flat)
    tokens = random_tokens(CFG, 1, 9)
    batch = Batch(np.asarray(tokens[:, :-1]), np.asarray(tokens[:, 1:]))
    with jax_option("jax_disable_most_optimizations"):
        state = TrainState(params, biases, None)
        return first_bad_layer(graphdef, state, batch, TrainConfig(dtype="float32"))


def test_weights_that_are_not_finite_are_named():
    path = ("moe_layers", "mla", "w_o_HU_D")
    assert said((path, jnp.nan)) == ("weights not finite before the step: moe_layers.mla.w_o_HU_D")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "layer"),
    [
        (("dense_layers", "dense", "w_down_FD"), "layers.0"),
        (("mtp", 0, "w_proj_DD_D"), "mtp.0"),
    ],
)
def test_the_first_output_that_is_not_finite_is_named(path: tuple, layer: str):
    assert said((path, 3e38)) == f"the output of {layer} is not finite"


@pytest.mark.slow
def test_the_first_gradient_that_is_not_finite_is_named(monkeypatch: pytest.MonkeyPatch):
    """Attention's rule gives NaN: met first, on the way back, in the last layer."""

    @jax.custom_vjp
    def bad(q, k, v):
        return attention_module.attention(q, k, v, 0.3)

    bad.defvjp(lambda *qkv: (bad(*qkv), qkv), lambda qkv, do: [x * jnp.nan for x in qkv])
    monkeypatch.setattr(mla, "attention", lambda q, k, v, scale, segments: bad(q, k, v))
    assert said().startswith("the gradient of layers.2.")


@pytest.mark.slow
def test_where_all_is_finite_that_is_said():
    assert said().startswith("all outputs and the main loss's gradient are finite")
