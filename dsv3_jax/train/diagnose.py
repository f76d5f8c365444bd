"""Where numbers stop being finite: the model run layer by layer, forward and back."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.config import TrainConfig
from dsv3_jax.data.loader import Batch
from dsv3_jax.model.cross_entropy import cross_entropy
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.transformer import DeepSeekV3, positions
from dsv3_jax.model.yarn import rope_table
from dsv3_jax.parallel.mesh import parameter_name
from dsv3_jax.train.step import TrainState


def first_bad_layer(
    graphdef: nnx.GraphDef, state: TrainState, batch: Batch, cfg: TrainConfig
) -> str:
    """Says which layer's output, or else which layer's gradient, is not finite first in these rows.

    Slow: each kind of layer is compiled for itself. Gradients are those of the main loss.
    """
    model = nnx.merge(graphdef, state.params, state.biases)
    batch = jax.device_put(batch)
    bad = [
        parameter_name(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
        if not _finite(leaf)
    ]
    if bad:
        return f"weights not finite before the step: {', '.join(bad[:3])}"
    found = _in_main_model(model, batch, jnp.dtype(cfg.dtype))
    return found or _in_mtp(model, batch, jnp.dtype(cfg.dtype))


def _in_mtp(model: DeepSeekV3, batch: Batch, dtype: jnp.dtype) -> str:
    valid_BT, segments_BT = batch.labels_BT >= 0, batch.segments_BT

    @jax.jit
    def outputs(model):
        h_BTD, _ = model.hidden(batch.tokens_BT, valid_BT, dtype, segments_BT=segments_BT)
        depths = model.mtp_hidden(h_BTD, batch.tokens_BT, valid_BT, segments_BT=segments_BT)
        return [h_BTD for h_BTD, _ in depths]

    for k, h_BTD in enumerate(outputs(model)):
        if not _finite(h_BTD):
            return f"the output of mtp.{k} is not finite"
    return "all outputs and the main loss's gradient are finite; left: MTP, the balance loss"


def _in_main_model(model: DeepSeekV3, batch: Batch, dtype: jnp.dtype) -> str:
    """Empty if all is finite."""
    valid_BT = batch.labels_BT >= 0
    inputs = [model.embed(batch.tokens_BT, dtype)]
    rope_BTR = rope_table(model.cfg, positions(batch.tokens_BT, batch.segments_BT), dtype)
    run = jax.jit(lambda block, x: block(x, rope_BTR, valid_BT, batch.segments_BT)[0])
    layers = list(_layers(model))
    for name, block in layers:
        inputs.append(run(block, inputs[-1]))
        if not _finite(inputs[-1]):
            return f"the output of {name} is not finite"
    total, (dhead, dx_BTD) = jax.value_and_grad(_head_loss, (0, 1))(
        (model.norm_D[...], model.head()), inputs[-1], batch.labels_BT, model.cfg.rms_eps
    )
    if not _finite((total, dhead, dx_BTD)):
        return "the output head's loss or gradient is not finite"
    back = jax.jit(partial(_backward, run))
    for (name, block), x_BTD in zip(reversed(layers), reversed(inputs[:-1]), strict=True):
        dblock, dx_BTD = back(block, x_BTD, dx_BTD)
        for path, grad in jax.tree_util.tree_leaves_with_path(dblock):
            if not _finite(grad):
                return f"the gradient of {name}.{parameter_name(path)} is not finite"
        if not _finite(dx_BTD):
            return f"the gradient of {name}'s input is not finite"
    return ""


def _layers(model: DeepSeekV3):
    """Name and module of each layer in order."""
    first = 0
    for stack, count in (
        (model.dense_layers, model.cfg.num_dense_layers),
        (model.moe_layers, model.cfg.num_moe_layers),
    ):
        for i in range(count):
            yield f"layers.{first + i}", jax.tree.map(lambda x, i=i: x[i], stack)
        first += count


def _head_loss(weights, x_BTD, labels_BT, eps: float) -> jax.Array:
    norm_D, head_DV = weights
    return cross_entropy(rms_norm(x_BTD, norm_D, eps), head_DV, labels_BT)


def _backward(run: Callable, block, x_BTD, dy_BTD):
    """Gradients of a layer's weights and input. Biases have none."""
    graphdef, params, rest = nnx.split(block, nnx.Param, ...)
    _, pull = jax.vjp(lambda p, x: run(nnx.merge(graphdef, p, rest), x), params, x_BTD)
    return pull(dy_BTD)


def _finite(tree) -> bool:
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))
