"""One step: micro-batches add up, the biases move by the load and nothing else moves them."""

from dataclasses import replace
from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax.tree_utils import tree_get, tree_set

from dsv3_jax.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from dsv3_jax.data.loader import Batch
from dsv3_jax.model.cross_entropy import cross_entropy
from dsv3_jax.model.layers import Init
from dsv3_jax.model.router import RouterBias
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.train import loss as loss_module
from dsv3_jax.train import step as step_module
from dsv3_jax.train.loss import LossParts
from dsv3_jax.train.step import (
    PARTS,
    Coefficients,
    TrainState,
    abstract_state,
    all_finite,
    gradients,
    init_state,
    make_step,
    move_biases,
    norms_by_part,
    squared_norms,
)
from tests.runs import empty_moments
from tests.shapes import FAST_COMPILATION, compiled, random_model, random_tokens, tiny_model
from tests.tolerances import FLOAT64, assert_close

B, T = 4, 6
RUN = RunConfig(
    # A dense layer and an MTP module, which has experts.
    model=tiny_model(num_layers=1, q_latent=None, num_shared_experts=0),
    data=DataConfig(length=T),
    train=TrainConfig(rows=B, dtype="float32", balance_weight=0.0),
    optimizer=OptimizerConfig(weight_decay=0.1),
)


def state_of(cfg: RunConfig, dtype=jnp.float32) -> tuple[nnx.GraphDef, TrainState]:
    """What `init_state` returns, with the random weights and biases of the tests."""
    graphdef, params, biases = nnx.split(random_model(cfg.model, dtype), nnx.Param, RouterBias)
    return graphdef, TrainState(params, biases, empty_moments(cfg, params))


def batch_of(cfg: RunConfig) -> Batch:
    """Tokens and labels; rows have 6, 1, 4 and 0 labels that count."""
    sequence = random_tokens(cfg.model, B, T + 1)
    counted = jnp.arange(T)[None] < jnp.array([[6], [1], [4], [0]])
    return Batch(sequence[:, :-1], jnp.where(counted, sequence[:, 1:], -1))


def coefficients(
    learning_rate: float, bias_speed: float, mtp_weight: float = 0.3, limit: float = np.inf
) -> Coefficients:
    values = learning_rate, bias_speed, mtp_weight, limit
    return Coefficients(*(jnp.float32(x) for x in values))


@cache
def step_program():
    """The compiled step, one for all tests of this file."""
    graphdef, state = state_of(RUN)
    lowered = make_step(graphdef, RUN).lower(state, batch_of(RUN), coefficients(0, 0))
    return lowered.compile(FAST_COMPILATION)


def take_step(learning_rate: float, bias_speed: float, batch=None, limit: float = np.inf):
    """The state before and after one step, as NumPy arrays, and the step's metrics."""
    _, state = state_of(RUN)
    before = jax.tree.map(np.array, state)
    rates = coefficients(learning_rate, bias_speed, limit=limit)
    after, metrics = step_program()(state, batch or batch_of(RUN), rates)
    return before, jax.tree.map(np.array, after), metrics


def test_weights_that_an_update_spoils_are_told():
    """Gradient and loss are finite, so the update is made."""
    for moment, finite in ((0, True), (3e38, False)):
        _, state = state_of(RUN)
        mu = jax.tree.map(lambda m, x=moment: jnp.full_like(m, x), tree_get(state.optimizer, "mu"))
        state = state._replace(optimizer=tree_set(state.optimizer, mu=mu))
        after, metrics = step_program()(state, batch_of(RUN), coefficients(1.0, 0))
        assert bool(metrics.applied)
        assert bool(metrics.weights_are_finite) is finite
        assert all(np.isfinite(p).all() for p in jax.tree.leaves(after.params)) is finite


@cache
def gradients_by_parts(microbatches: int) -> tuple:
    """In float64."""
    parts = {"microbatches": microbatches, "dtype": "float64", "balance_weight": 0.5}
    cfg = replace(RUN, train=replace(RUN.train, **parts))
    graphdef, state = state_of(cfg, jnp.float64)
    program = compiled(lambda *args: gradients(graphdef, *args, cfg))
    return program(state, batch_of(cfg), jnp.asarray(0.3))


@pytest.mark.parametrize("microbatches", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_micro_batches_add_up_to_the_whole_step(x64, microbatches: int):
    """Loss, its parts, loads and every gradient; micro-batches have very different label counts."""
    whole = gradients_by_parts(1)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(whole[1]))
    assert_close(gradients_by_parts(microbatches), whole, FLOAT64)


def test_a_step_without_learning_rate_moves_the_biases_alone_against_the_load():
    before, after, metrics = take_step(learning_rate=0.0, bias_speed=0.25)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    load = np.asarray(metrics.parts.load_LE)
    np.testing.assert_array_equal(load.sum(-1), [(5 + 0 + 3) * 2])  # a label less in each row
    (moved,), (old,) = (jax.tree.leaves(state.biases) for state in (after, before))
    sign = np.sign(load[0].mean() - load[0]).astype(np.float32)
    np.testing.assert_array_equal(moved, old + np.float32(0.25) * sign)
    assert np.any(sign > 0)
    assert np.any(sign < 0)
    violation = load.max(-1) / load.mean(-1) - 1
    np.testing.assert_allclose(metrics.max_violation_L, violation, rtol=1e-6)
    np.testing.assert_array_equal(metrics.bias_LE, moved.reshape(1, -1))
    assert metrics.bias_moved_L.tolist() == [True]


def test_a_step_without_speed_moves_the_parameters_alone():
    before, after, metrics = take_step(learning_rate=0.01, bias_speed=0.0)
    jax.tree.map(np.testing.assert_array_equal, after.biases, before.biases)
    assert metrics.bias_moved_L.tolist() == [False]
    moved = jax.tree.map(lambda a, b: (a != b).any(), after.params, before.params)
    assert all(jax.tree.leaves(moved))
    assert metrics.loss > 0


def test_decay_leaves_norm_gains_and_biases_alone():
    """No label counts and no balance loss: gradients are zero, and what moves moves by decay."""
    tokens, labels, *_ = batch_of(RUN)
    batch = Batch(tokens, jnp.full_like(labels, -1))
    before, after, metrics = take_step(learning_rate=0.5, bias_speed=0.25, batch=batch)
    assert metrics.grad_norm == metrics.loss == 0
    jax.tree.map(np.testing.assert_array_equal, after.biases, before.biases)
    flat = zip(nnx.to_flat_state(after.params), nnx.to_flat_state(before.params), strict=True)
    for (path, new), (_, old) in flat:
        factor = 1 if "norm" in path[-1] else 1 - 0.5 * 0.1
        np.testing.assert_allclose(new[...], old[...] * np.float32(factor), rtol=1e-6, err_msg=path)


def test_parameters_without_a_gradient_are_found_layer_by_layer():
    _, _, metrics = take_step(0.0, 0.0)
    assert all(np.all(square > 0) for square in jax.tree.leaves(metrics.squared_norms))
    shapes = nnx.state(jax.eval_shape(lambda: random_model(tiny_model(num_layers=4))), nnx.Param)
    grads = jax.tree.map(lambda p: np.ones(p.shape, np.float32), shapes)
    dict(nnx.to_flat_state(grads))["moe_layers", "mla", "w_o_HU_D"].get_value()[1] = 0
    dict(nnx.to_flat_state(grads))["mtp", 0, "norm_D"].get_value()[:] = 0
    squares = nnx.to_flat_state(compiled(squared_norms)(grads))
    found = {path: np.asarray(square.get_value()) == 0 for path, square in squares}
    assert {path: zero.tolist() for path, zero in found.items() if zero.any()} == {
        ("moe_layers", "mla", "w_o_HU_D"): [False, True, False],
        ("mtp", 0, "norm_D"): True,
    }


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_weight_that_is_not_finite_is_seen_and_large_ones_are_not(bad: float):
    """Compiled as a run compiles it: 0 times a weight must not be made 0."""
    run = jax.jit(all_finite)
    weights = {"a": np.full((3, 4), 3e38, np.float32), "b": np.ones(5, np.float32)}
    assert run(weights)
    for name, place in (("a", (1, 2)), ("b", (4,))):
        spoilt = {key: value.copy() for key, value in weights.items()}
        spoilt[name][place] = bad
        assert not run(spoilt)


def test_an_infinite_norm_of_one_part_leaves_the_others_alone():
    squares = {"embed_VD": jnp.asarray(jnp.inf), "norm_D": jnp.asarray(4.0)}
    norms = compiled(norms_by_part)(squares)
    assert {part: float(norm) for part, norm in norms.items()} == {"embedding": np.inf, "norm": 2}


def assert_unchanged(before: TrainState, after: TrainState) -> None:
    jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_gradient_that_is_not_finite_under_a_finite_loss_changes_nothing(monkeypatch, bad):
    graphdef, state = state_of(RUN)

    def made_up(graphdef, state, batch, mtp_weight, cfg, sharding):
        grads = jax.tree.map(jnp.ones_like, state.params)
        grads["norm_D"] = jax.tree.map(lambda g: g.at[3].set(bad), grads["norm_D"])
        zero = jnp.zeros(())
        parts = LossParts(zero + 2, zero, zero, jnp.zeros((1, RUN.model.num_experts), jnp.int32))
        return zero + 2, grads, parts, jnp.ones(B, bool), None

    monkeypatch.setattr(step_module, "gradients", made_up)
    before = jax.tree.map(np.array, state)
    run = make_step(graphdef, RUN).lower(state, batch_of(RUN), coefficients(0.01, 0.25))
    after, metrics = run.compile(FAST_COMPILATION)(state, batch_of(RUN), coefficients(0.01, 0.25))
    assert not metrics.applied
    assert_unchanged(before, after)


def test_a_loss_above_the_limit_changes_nothing():
    """Neither parameters nor biases nor moments nor the count of updates."""
    _, _, metrics = take_step(0.01, 0.25)
    main = float(metrics.parts.main)
    before, after, metrics = take_step(0.01, 0.25, limit=main * 0.999)
    assert_unchanged(before, after)
    assert not metrics.applied
    assert metrics.row_is_finite_B.all()
    _, _, metrics = take_step(0.01, 0.25, limit=main * 1.001)
    assert metrics.applied


@cache
def poisoned_gradients():
    """Compiled gradients in which the backward pass of the output head makes row 2 NaN, in two
    micro-batches.
    """

    @jax.custom_vjp
    def poison(h_BTD, rows_B):
        return h_BTD

    def backward(rows_B, dh_BTD):
        return jnp.where(rows_B[:, None, None], jnp.nan, dh_BTD), None

    poison.defvjp(lambda h_BTD, rows_B: (h_BTD, rows_B), backward)

    def bad_cross_entropy(h_BTD, head_DV, labels_BT, weights_BT):
        return cross_entropy(
            poison(h_BTD, (labels_BT >= 0).sum(-1) == 4), head_DV, labels_BT, weights_BT
        )

    cfg = replace(RUN, train=replace(RUN.train, microbatches=2))
    graphdef, state = state_of(cfg)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "cross_entropy", bad_cross_entropy)
        return compiled(lambda *args: gradients(graphdef, *args, cfg))(
            state, batch_of(cfg), jnp.float32(0.0)
        )


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_is_traced_to_its_row():
    """Row 2 has 4 labels; the loss stays finite."""
    total, grads, _, row_is_finite_B, _ = poisoned_gradients()
    assert np.isfinite(total)
    assert not np.isfinite(optax.tree.norm(grads))
    assert row_is_finite_B.tolist() == [True, True, False, True]


def test_a_gradient_that_is_not_finite_changes_nothing():
    """A NaN in the embedding of a token that only one row holds."""
    _, state = state_of(RUN)
    batch = batch_of(RUN)
    tokens = np.asarray(batch.tokens_BT).copy()
    tokens[tokens == 63] = 62
    tokens[1, 3] = 63
    params = dict(nnx.to_flat_state(state.params))
    embed = params["embed_VD",]
    params["embed_VD",] = embed.replace(embed[...].at[63].set(jnp.nan))
    state = state._replace(params=nnx.from_flat_state(params))
    before = jax.tree.map(np.array, state)
    bad = Batch(jnp.asarray(tokens), batch.labels_BT)
    after, metrics = step_program()(state, bad, coefficients(0.01, 0.25))
    assert_unchanged(before, after)
    assert not metrics.applied
    assert metrics.row_is_finite_B.tolist() == [True, False, True, True]


def test_every_parameter_counts_in_one_part_of_the_gradient_norm():
    model = random_model(tiny_model(num_layers=3, num_dense_layers=1))
    grads = nnx.state(model, nnx.Param)
    found = compiled(lambda grads: norms_by_part(squared_norms(grads)))(grads)
    norms = {part: float(norm) for part, norm in found.items()}
    assert set(norms) == {*PARTS.values()}
    total = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(grads)))
    np.testing.assert_allclose(np.sqrt(sum(n**2 for n in norms.values())), total, rtol=1e-5)
    names = "w_gate_EDF", "w_up_EDF", "w_down_EFD"
    experts = [np.asarray(getattr(model.moe_layers.moe, name)[...]) for name in names]
    expected = np.sqrt(sum(np.square(weight).sum() for weight in experts))
    np.testing.assert_allclose(norms["experts"], expected, rtol=1e-5)


def test_a_step_is_the_same_bit_for_bit_when_repeated():
    first, second = (take_step(0.01, 0.25) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first[1:], second[1:])


def test_the_gradient_is_clipped_and_its_norm_reported_before():
    """The first moment after one step is (1 - b1) times the clipped gradient."""
    _, after, metrics = take_step(0.0, 0.0)
    moments = [np.asarray(m, np.float32) for m in jax.tree.leaves(after.optimizer[1].mu)]
    clipped = np.sqrt(sum(np.square(m).sum() for m in moments)) / (1 - RUN.optimizer.b1)
    np.testing.assert_allclose(clipped, RUN.optimizer.clip_norm, rtol=2**-8)
    assert metrics.grad_norm > 1.1 * RUN.optimizer.clip_norm


def test_repeated_steps_learn_the_batch():
    _, state = state_of(RUN)
    losses = []
    for _ in range(12):
        state, metrics = step_program()(state, batch_of(RUN), coefficients(0.01, 0.001))
        losses.append(float(metrics.parts.main))
    assert losses[-1] < 0.5 * losses[0]


def test_biases_meet_the_loads_of_their_own_layers():
    """Stacked layers first, then MTP modules by depth, twelve of them: 10 comes after 2."""
    cfg = tiny_model(num_layers=4, num_dense_layers=1, mtp_depth=12)
    model = random_model(cfg)
    before = biases_of(model)
    load = np.random.default_rng(0).integers(0, 10, (3 + 12, cfg.num_experts))
    biases = nnx.state(model, RouterBias)
    nnx.update(model, move_biases(biases, jnp.asarray(load, jnp.int32), jnp.float32(0.5)))
    expected = before + 0.5 * np.sign(load.mean(-1, keepdims=True) - load)
    np.testing.assert_allclose(biases_of(model), expected, rtol=1e-6)


def biases_of(model: DeepSeekV3) -> np.ndarray:
    routers = [module.block.moe.router for module in model.mtp]
    return np.concatenate(
        [model.moe_layers.moe.router.bias_E[...], [router.bias_E[...] for router in routers]]
    )


def test_the_optimiser_holds_no_bias():
    _, state = state_of(RUN)

    def is_bias(leaf: object) -> bool:
        return isinstance(leaf, RouterBias)

    def inside(tree: object) -> int:
        return sum(map(is_bias, jax.tree.leaves(tree, is_leaf=is_bias)))

    assert inside(state.biases) == 1
    assert inside(state.params) == inside(state.optimizer) == 0


def test_a_fresh_state_is_the_model_of_the_seed_with_empty_moments(monkeypatch):
    """Each weight here is filled with the number its random key begins with."""

    def drawn(self: Init, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        first = jax.random.key_data(key)[0].astype(self.dtype)
        return jnp.broadcast_to(first, shape)

    monkeypatch.setattr(Init, "drawn", drawn)
    model = tiny_model(num_layers=1, num_dense_layers=0, mtp_depth=0, num_shared_experts=0)
    cfg = replace(RUN, model=model, train=replace(RUN.train, seed=7))
    state = init_state(cfg)
    graphdef, shapes = abstract_state(cfg)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, shapes)
    expected = DeepSeekV3(model, rngs=nnx.Rngs(jax.random.key(7)))
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.merge(graphdef, state.params, state.biases),
        expected,
    )
    assert {p.dtype for p in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    assert not any(np.any(x) for x in jax.tree.leaves(state.optimizer))
