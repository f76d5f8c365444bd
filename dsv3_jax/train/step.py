"""One training step: gradients summed over micro-batches and devices, AdamW on each device's
shards, and the routers' bias update (report 2.1.2, 3.2, 4.2).

A step whose loss or gradient is not finite, or whose loss is above a limit, changes nothing.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from dsv3_jax.config import RunConfig
from dsv3_jax.data.loader import Batch
from dsv3_jax.model.fresh import fresh
from dsv3_jax.model.router import RouterBias, max_violation, updated_bias
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.parallel.dispatch import Traffic
from dsv3_jax.parallel.mesh import is_stacked, parameter_name
from dsv3_jax.quant.fp8 import Blocked
from dsv3_jax.quant.recipes import recipe_of
from dsv3_jax.quant.wide import wide
from dsv3_jax.train.loss import LossParts, loss
from dsv3_jax.train.optimizer import adamw, check_groups
from dsv3_jax.train.quantized_weights import attach, quantize_weights
from dsv3_jax.train.sharding import ONE_DEVICE, ROWS, WHOLE, RunSharding

# The compiler's options for programs that run a few times or never: a third of its time. One that
# makes weights must not be optimised besides: its numbers would depend on how the compiler fuses
# them. (That of `tiny` would be done 0.8 s sooner, but compile 0.8 longer.)
UNOPTIMISED = {"xla_backend_optimization_level": 0}


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
    loss_limit: jax.Array
    """Main loss above which the update is skipped"""


class StepMetrics(NamedTuple):
    """What one step tells beside its new state."""

    loss: jax.Array
    parts: LossParts
    grad_norm: jax.Array
    """Of the whole gradient before clipping"""
    grad_norms: dict[str, jax.Array]
    """Of parts of the model, by name"""
    applied: jax.Array
    """bool: whether the update was made"""
    weights_are_finite: jax.Array
    """bool: after the step"""
    row_is_finite_B: jax.Array
    """Whether a row's gradient is"""
    max_violation_L: jax.Array
    """MaxVio of every router, MTP's last"""
    bias_LE: jax.Array
    """The routers' biases after the step"""
    bias_moved_L: jax.Array
    """bool: whether any of a router's did"""
    squared_norms: nnx.State
    """Of the gradient of each parameter, for each layer of a stack; 0 where none above 1e-19 is"""
    traffic: "StepTraffic | None"
    """Of tokens with experts on other devices"""


class StepTraffic(NamedTuple):
    """What the exchanges of a step took: every router's, MTP's last [L], over its micro-batches."""

    total: Traffic
    """Of all devices"""
    most_received_L: jax.Array
    """Token copies at the fullest device"""
    most_rounds_L: jax.Array


def abstract_state(cfg: RunConfig) -> tuple[nnx.GraphDef, TrainState]:
    """The model's structure, and shapes and dtypes of its `init_state`; nothing is computed."""
    return jax.eval_shape(lambda: _with_optimizer(cfg, DeepSeekV3(cfg.model, rngs=nnx.Rngs(0))))


def init_state(cfg: RunConfig, sharding: RunSharding = ONE_DEVICE) -> TrainState:
    """A fresh model and optimiser from `train.seed`, made in one compiled program, each device its
    shards.
    """
    placements = sharding.placements(sharding.state_specs(abstract_state(cfg)[1]))
    build = jax.jit(
        lambda key: _with_optimizer(cfg, fresh(cfg.model, key))[1],
        compiler_options=UNOPTIMISED,
        out_shardings=placements,
    )
    return build(jax.random.key(cfg.train.seed))


def _with_optimizer(cfg: RunConfig, model: DeepSeekV3) -> tuple[nnx.GraphDef, TrainState]:
    graphdef, params, biases = nnx.split(model, nnx.Param, RouterBias)
    return graphdef, TrainState(params, biases, adamw(cfg.optimizer).init(params))


def check_state(cfg: RunConfig) -> None:
    """ValueError for what only the model's parameters can tell of a configuration."""
    if cfg.optimizer.groups:
        check_groups(cfg.optimizer, abstract_state(cfg)[1].params)


def make_step(
    graphdef: nnx.GraphDef, cfg: RunConfig, sharding: RunSharding = ONE_DEVICE
) -> Callable:
    """Compiled `step(state, batch, coefficients) -> (state, StepMetrics)`.

    The state is donated.
    """

    def step(state: TrainState, batch: Batch, coefficients: Coefficients):
        total, grads, parts, row_is_finite_B, traffic = gradients(
            graphdef, state, batch, coefficients.mtp_weight, cfg, sharding
        )

        squares = sharding.sum_of_shards(squared_norms(grads))
        decided = decide(total, parts.main, squares, coefficients)
        after = updated(cfg, state, grads, parts.load_LE, decided, coefficients)
        bias_LE = stacked_biases(after.biases)
        metrics = StepMetrics(
            total,
            parts,
            decided.norm,
            decided.norms,
            decided.applied,
            sharding.sum((~all_finite(after.params)).astype(jnp.int32)) == 0,
            row_is_finite_B,
            max_violation(parts.load_LE),
            bias_LE,
            (bias_LE != stacked_biases(state.biases)).any(-1),
            squares,
            traffic,
        )
        return after, metrics

    specs = sharding.state_specs(abstract_state(cfg)[1])
    told = StepMetrics(*[WHOLE] * len(StepMetrics._fields))
    told = told._replace(row_is_finite_B=sharding.row_spec)
    step = sharding.per_device(step, (specs, ROWS, WHOLE), (specs, told))
    return jax.jit(step, donate_argnums=0)


class Decided(NamedTuple):
    """About an update, from the whole gradient: norms of parts, norm, whether to make it."""

    norms: dict[str, jax.Array]
    norm: jax.Array
    applied: jax.Array


def decide(
    total: jax.Array, main: jax.Array, squares: nnx.State, coefficients: Coefficients
) -> Decided:
    """From a step's loss, its main part and its gradient's `squared_norms`."""
    norms = norms_by_part(squares)
    norm = optax.tree.norm(norms)
    applied = jnp.isfinite(total) & jnp.isfinite(norm) & (main <= coefficients.loss_limit)
    return Decided(norms, norm, applied)


def updated(
    cfg: RunConfig,
    state: TrainState,
    grads: nnx.State,
    load_LE: jax.Array,
    decided: Decided,
    coefficients: Coefficients,
) -> TrainState:
    """The state after an update, of a whole model or a part; as it was if none is to be made."""
    transform = adamw(cfg.optimizer)
    updates, optimizer = transform.update(grads, state.optimizer, state.params, norm=decided.norm)
    updates = jax.tree.map(lambda u: -coefficients.learning_rate * u, updates)
    params = optax.apply_updates(state.params, updates)
    biases = move_biases(state.biases, load_LE, coefficients.bias_speed)
    # Chosen by element in the passes that update anyway: a branch copies the whole state.
    after = TrainState(params, biases, optimizer)
    return jax.tree.map(partial(jnp.where, decided.applied), after, state)


def gradients(
    graphdef: nnx.GraphDef,
    state: TrainState,
    batch: Batch,
    mtp_weight: jax.Array,
    cfg: RunConfig,
    sharding: RunSharding = ONE_DEVICE,
) -> tuple[jax.Array, nnx.State, LossParts, jax.Array, StepTraffic | None]:
    """Loss, float32 gradients and loss parts of a whole step's rows, in micro-batches one after the
    other; whether each row's gradient is finite, bool [B]; and what exchanges took.

    Of several devices, each has its rows, and of the gradients its shards.
    """
    ready = prepared(graphdef, state, batch, mtp_weight, cfg, sharding)
    count = len(ready.micros.labels_BT)

    def value_and_grad(micro):
        slot_B = jnp.zeros(len(micro.labels_BT), wide(jnp.dtype(cfg.train.dtype)))
        value, (grads, dslot_B) = jax.value_and_grad(ready.loss, (0, 1), has_aux=True)(
            ready.params, sharding.differing(slot_B), micro
        )
        return sharding.differing((*value, grads)), jnp.isfinite(dslot_B)

    def of_all_devices(sums, row_is_finite):
        total, parts, grads = sums
        traffic = step_traffic(parts.traffic, sharding)
        total, parts = sharding.sum((total, parts._replace(traffic=None)))
        finite = sharding.of_rows(row_is_finite.reshape(-1))
        return total, sharding.reduce(grads), parts, finite, traffic

    first = jax.tree.map(lambda x: x[0], ready.micros)
    if count == 1:
        return of_all_devices(*value_and_grad(first))

    def accumulate(carry, micro):
        sums, row_is_finite_B = value_and_grad(micro)
        return jax.tree.map(jnp.add, carry, sums), row_is_finite_B

    shapes, _ = jax.eval_shape(value_and_grad, first)
    zeros = sharding.differing(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
    return of_all_devices(*lax.scan(accumulate, zeros, ready.micros))


class Prepared(NamedTuple):
    """What the micro-batches of a step have in common, on one device."""

    params: nnx.State
    """Masters as they are computed with"""
    blocks: Mapping[str, Blocked]
    """Of weights that the recipe quantises"""
    micros: Batch
    """Stacked"""
    loss: Callable
    """Of params, slots of a micro-batch's rows [B], micro-batch: (its loss, parts)"""


def prepared(
    graphdef: nnx.GraphDef,
    state: TrainState,
    batch: Batch,
    mtp_weight: jax.Array,
    cfg: RunConfig,
    sharding: RunSharding = ONE_DEVICE,
) -> Prepared:
    """Once a step: weights gathered and quantised, and the loss that each micro-batch takes."""
    count = len(batch.labels_BT) * sharding.row_groups * cfg.train.microbatches // cfg.train.rows
    valid_tokens = jnp.maximum(sharding.sum((batch.labels_BT >= 0).sum()), 1)
    micros = jax.tree.map(lambda x: x.reshape(count, -1, x.shape[-1]), batch)
    params = sharding.gather(state.params)
    recipe = recipe_of(cfg.quant)
    blocks = quantize_weights(params, recipe)

    def one(params, slot_B, micro):
        params = attach(params, blocks, recipe)
        model = nnx.merge(graphdef, params, state.biases)
        # The balance loss is a mean over rows; the other parts are sums over the step's valid
        # tokens.
        row_share = 1 / (count * sharding.token_shards)
        return loss(
            model, micro, valid_tokens, mtp_weight, cfg.train, row_share, slot_B, sharding.plan
        )

    return Prepared(params, blocks, micros, one)


def step_traffic(traffic: Traffic | None, sharding: RunSharding) -> StepTraffic | None:
    """Of all devices, from each device's own."""
    if traffic is None:
        return None
    most = sharding.max((traffic.received, traffic.rounds))
    return StepTraffic(sharding.sum(traffic), *most)


def squared_norms(grads: nnx.State) -> nnx.State:
    """Sum of squares of every parameter's gradient: [L] for a stack of layers, or [].

    What is below 1e-19 may be 0 squared, here as in Adam's second moment.
    """

    def of_layers(path: tuple, grad: jax.Array) -> jax.Array:
        stacked = is_stacked(parameter_name(path))
        return jnp.square(grad).sum(tuple(range(stacked, grad.ndim)))

    return jax.tree_util.tree_map_with_path(of_layers, grads)


def norms_by_part(squares: nnx.State) -> dict[str, jax.Array]:
    """Global norm of the gradient of each part of the model, from `squared_norms`.

    All in one vector, since XLA:CPU compiles every small sum for itself; N counts parameters and
    their layers, P parts.
    """
    leaves = jax.tree_util.tree_leaves_with_path(squares)
    parts = [part_of(parameter_name(path)) for path, _ in leaves]
    names = list(dict.fromkeys(parts))
    part_N = np.repeat(parts, [square.size for _, square in leaves])
    square_N = jnp.concatenate([square.reshape(-1) for _, square in leaves])
    # Chosen, not multiplied by 0 or 1: one part's infinity is no other's NaN.
    square_PN = jnp.where(part_N[None, :] == np.array(names)[:, None], square_N[None, :], 0)
    return dict(zip(names, jnp.sqrt(square_PN.sum(-1)), strict=True))


PARTS = {
    "mtp.": "mtp",
    "norm": "norm",
    "embed": "embedding",
    "head": "head",
    ".mla.": "attention",
    ".router.": "router",
    ".shared.": "shared",
    ".moe.": "experts",
    ".dense.": "dense",
}


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, by its name."""
    return next(part for key, part in PARTS.items() if key in name)


def all_finite(params: nnx.State) -> jax.Array:
    """bool: whether every parameter is. 0 times what is not is NaN, and remains it in a sum: one
    pass on CPUs, where a test of every element takes two.
    """
    return jnp.isfinite(jnp.stack([(0 * p).sum() for p in jax.tree.leaves(params)])).all()


def move_biases(biases: nnx.State, load_LE: jax.Array, speed: jax.Array) -> nnx.State:
    """Every router's bias after the step's load.

    Rows of `load_LE`: stacked MoE layers, then MTP modules.
    """
    row, moved = 0, {}
    for path, variable in _in_order(biases):
        bias = variable[...]
        layers = bias.shape[0] if bias.ndim == 2 else 1
        load = load_LE[row : row + layers].reshape(bias.shape)
        moved[path] = variable.replace(updated_bias(bias, load, speed))
        row += layers
    assert row == len(load_LE), f"{row} routers have a bias, {len(load_LE)} a load"
    return nnx.from_flat_state(moved)


def stacked_biases(biases: nnx.State) -> jax.Array:
    """[L, E], in the order of the loads."""
    rows = [jnp.atleast_2d(variable[...]) for _, variable in _in_order(biases)]
    return jnp.concatenate(rows) if rows else jnp.zeros((0, 0))


def _in_order(biases: nnx.State) -> list[tuple[tuple, nnx.Variable]]:
    """Stacked MoE layers first, then MTP modules."""
    flat = nnx.to_flat_state(biases)
    return sorted(flat, key=lambda item: (item[0][0] == "mtp", item[0]))
