"""One training step on one device: gradients summed over micro-batches, AdamW, and the routers'
bias update (report 2.1.2, 4.2).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from dsv3_jax.config import RunConfig
from dsv3_jax.data.loader import Batch
from dsv3_jax.model.router import RouterBias, max_violation, updated_bias
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.train.loss import LossParts, loss
from dsv3_jax.train.optimizer import adamw


class TrainState(NamedTuple):
    """Everything a step changes.

    `params` are the float32 masters, `biases` the routers' (nnx states of one model).
    """

    params: nnx.State
    biases: nnx.State
    optimizer: optax.OptState


class Coefficients(NamedTuple):
    """What schedules decide per step; arguments of the compiled step, so a change never compiles
    again.
    """

    learning_rate: jax.Array
    bias_speed: jax.Array
    mtp_weight: jax.Array


class StepMetrics(NamedTuple):
    """Scalars of one step beside the loss's parts: gradient norm before clipping, MaxVio as the
    mean over layers.
    """

    loss: jax.Array
    parts: LossParts
    grad_norm: jax.Array
    max_violation: jax.Array
    silent: nnx.State


def init_state(cfg: RunConfig) -> tuple[nnx.GraphDef, TrainState]:
    """A fresh model and optimiser from `train.seed`, made in one compiled program."""

    def build(key):
        model = DeepSeekV3(cfg.model, rngs=nnx.Rngs(key))
        _, params, biases = nnx.split(model, nnx.Param, RouterBias)
        return TrainState(params, biases, adamw(cfg.optimizer).init(params))

    shape_only = jax.eval_shape(
        lambda key: DeepSeekV3(cfg.model, rngs=nnx.Rngs(key)), jax.random.key(0)
    )
    graphdef = nnx.split(shape_only, nnx.Param, RouterBias)[0]
    # Runs once, so it is compiled without optimisation: 5 s of CPU time instead of 18 for `tiny`.
    build = jax.jit(build, compiler_options={"xla_backend_optimization_level": 0})
    return graphdef, build(jax.random.key(cfg.train.seed))


def make_step(graphdef: nnx.GraphDef, cfg: RunConfig) -> Callable:
    """Compiled `step(state, batch, coefficients) -> (state, StepMetrics)`.

    The state is donated.
    """
    transform = adamw(cfg.optimizer)

    def step(state: TrainState, batch: Batch, coefficients: Coefficients):
        total, grads, parts = gradients(graphdef, state, batch, coefficients.mtp_weight, cfg)
        updates, optimizer = transform.update(grads, state.optimizer, state.params)
        updates = jax.tree.map(lambda u: -coefficients.learning_rate * u, updates)
        params = optax.apply_updates(state.params, updates)
        biases = move_biases(state.biases, parts.load_LE, coefficients.bias_speed)
        metrics = StepMetrics(
            total,
            parts,
            optax.tree.norm(grads),
            max_violation(parts.load_LE).mean(),
            silent(grads),
        )
        return TrainState(params, biases, optimizer), metrics

    return jax.jit(step, donate_argnums=0)


def gradients(
    graphdef: nnx.GraphDef, state: TrainState, batch: Batch, mtp_weight: jax.Array, cfg: RunConfig
) -> tuple[jax.Array, nnx.State, LossParts]:
    """Loss, float32 gradients and loss parts of a whole step's rows, in `train.microbatches`
    sequential parts.
    """
    count = cfg.train.microbatches
    valid_tokens = jnp.maximum((batch.labels_BT >= 0).sum(), 1)
    parts_of = jax.tree.map(lambda x: x.reshape(count, -1, x.shape[-1]), batch)

    def one(params, micro):
        model = nnx.merge(graphdef, params, state.biases)
        # The balance loss is a mean over rows; the other parts are sums over the step's valid
        # tokens.
        return loss(model, micro, valid_tokens, mtp_weight, cfg.train, 1 / count)

    value_and_grad = jax.value_and_grad(one, has_aux=True)
    if count == 1:
        (total, parts), grads = value_and_grad(state.params, jax.tree.map(lambda x: x[0], parts_of))
        return total, grads, parts

    def accumulate(carry, micro):
        (total, parts), grads = value_and_grad(state.params, micro)
        return jax.tree.map(jnp.add, carry, (total, grads, parts)), None

    first = jax.tree.map(lambda x: x[0], parts_of)
    (total, parts), grads = jax.eval_shape(value_and_grad, state.params, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (total, grads, parts))
    return lax.scan(accumulate, zeros, parts_of)[0]


def silent(grads: nnx.State) -> nnx.State:
    """Whether no gradient reached a parameter: a bool for each, for each layer of a stack."""

    def is_zero(path: tuple, grad: jax.Array) -> jax.Array:
        stacked = path[0].key in ("dense_layers", "moe_layers")
        return (grad == 0).all(tuple(range(stacked, grad.ndim)))

    return jax.tree_util.tree_map_with_path(is_zero, grads)


def move_biases(biases: nnx.State, load_LE: jax.Array, speed: jax.Array) -> nnx.State:
    """Every router's bias after the step's load.

    Rows of `load_LE`: stacked MoE layers, then MTP modules.
    """
    flat = nnx.to_flat_state(biases)
    order = sorted(flat, key=lambda item: (item[0][0] == "mtp", item[0]))
    row, moved = 0, {}
    for path, variable in order:
        bias = variable[...]
        layers = bias.shape[0] if bias.ndim == 2 else 1
        load = load_LE[row : row + layers].reshape(bias.shape)
        moved[path] = variable.replace(updated_bias(bias, load, speed))
        row += layers
    assert row == len(load_LE), f"{row} routers have a bias, {len(load_LE)} a load"
    return nnx.from_flat_state(moved)
