"""The objective and its gradient against the report's equations, written out and differentiated by
JAX; advantages, divergence, weights, drift.
"""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import DataConfig, RunConfig, TrainConfig
from dsv3_jax.data.loader import Batch
from dsv3_jax.model.router import RouterBias
from dsv3_jax.posttrain.grpo_objective import (
    LogProbs,
    Place,
    advantages,
    divergence,
    drift,
    equal_groups,
    label_weights,
    sums_of,
    weighed,
)
from dsv3_jax.train.scoring import make_scores
from dsv3_jax.train.step import TrainState, gradients
from tests.shapes import compiled, random_model, tiny_model
from tests.tolerances import assert_close

LENGTH, CLIP, KL = 24, 0.2, 0.3
ORACLE = 1e-9  # log-probabilities of whole answers go through exp, and the weights through float64
CFG = RunConfig(
    model=tiny_model(num_layers=1, num_dense_layers=0, mtp_depth=0),
    data=DataConfig(length=LENGTH, format="prompts", isolate=True),
    train=TrainConfig(rows=2, microbatches=2, dtype="float64", balance_weight=0.0),
)
# Sizes of prompt and answer: two groups of three, packed in two rows.
SIZES = ((4, 3), (4, 5), (4, 2), (3, 6), (3, 1), (3, 4))
REWARDS = np.array([[1.0, 0.0, 0.25], [-1.0, -0.5, 2.0]])


def samples() -> list[tuple[np.ndarray, int]]:
    """Tokens of each prompt with its answer, and where the answer begins."""
    draw = np.random.default_rng(0)
    return [(draw.integers(2, 64, sum(size)), size[0]) for size in SIZES]


def packed() -> tuple[Batch, list[Place]]:
    tokens, labels = np.ones((2, LENGTH), np.int32), np.full((2, LENGTH), -1, np.int32)
    segments, places = np.full((2, LENGTH), 9, np.int32), []
    for number, (sample, begin) in enumerate(samples()):
        row, end = number % 2, sum(len(s) - 1 for s, _ in samples()[number % 2 : number : 2])
        own = slice(end, end + len(sample) - 1)
        tokens[row, own], segments[row, own] = sample[:-1], number
        places.append(Place(row, end + begin - 1, own.stop))
        labels[row, end + begin - 1 : own.stop] = sample[begin:]
    return Batch(tokens, labels, segments), places


def state_of(seed: int, near: float = 0.06) -> tuple[nnx.GraphDef, TrainState]:
    """Weights a little off those of seed 0, so that ratios are on both sides of the clip."""
    graphdef, params, biases = nnx.split(
        random_model(CFG.model, jnp.float64), nnx.Param, RouterBias
    )
    other = nnx.split(random_model(CFG.model, jnp.float64, seed), nnx.Param, RouterBias)[1]
    params = jax.tree.map(lambda a, b: a + near * (b - a), params, other)
    return graphdef, TrainState(params, biases, ())


def log_pi(graphdef: nnx.GraphDef, params: nnx.State, biases: nnx.State) -> jax.Array:
    """log pi(o_i|q) of each answer, in a row of its own, token by token."""
    model = nnx.merge(graphdef, params, biases)
    padded = np.ones((len(SIZES), max(map(sum, SIZES))), np.int32)
    for row, (sample, _) in enumerate(samples()):
        padded[row, : len(sample)] = sample
    log_p_BTV = jax.nn.log_softmax(model(jnp.asarray(padded)))
    found = [
        sum(log_p_BTV[row, t - 1, sample[t]] for t in range(begin, len(sample)))
        for row, (sample, begin) in enumerate(samples())
    ]
    return jnp.stack(found)


def oracle(graphdef, params, biases, old, reference) -> jax.Array:
    """J as Eq. 26-28 have it."""
    log_new = log_pi(graphdef, params, biases)
    total = 0.0
    for i, (log_old, log_ref) in enumerate(zip(old, reference, strict=True)):
        rewards = REWARDS[i // 3]
        a = (rewards[i % 3] - np.mean(rewards)) / np.std(rewards)
        rho = jnp.exp(log_new[i]) / np.exp(log_old)
        r = np.exp(log_ref) / jnp.exp(log_new[i])
        kl = r - jnp.log(r) - 1
        total += jnp.minimum(rho * a, jnp.clip(rho, 1 - CLIP, 1 + CLIP) * a) - KL * kl
    return total / len(SIZES)


@pytest.mark.slow
def test_objective_and_gradient_are_those_of_the_equations(x64):
    """Of packed rows in two micro-batches, by the training step's own gradient. Some answers are
    clipped, of both signs, and some are not.
    """
    graphdef, state = state_of(0)
    forward = compiled(lambda state: log_pi(graphdef, state.params, state.biases))
    old, reference = (np.asarray(forward(state_of(seed)[1])) for seed in (1, 2))
    by_equations = partial(oracle, graphdef, biases=state.biases, old=old, reference=reference)
    value, expected = compiled(jax.value_and_grad(by_equations))(state.params)
    batch, places = packed()
    new_N = sums_of(make_scores(graphdef, CFG)(state, batch), places)
    assert_close(new_N, np.asarray(forward(state)), ORACLE)
    found = weighed(advantages(REWARDS).ravel(), LogProbs(new_N, old, reference), CLIP, KL)
    assert 0 < found.is_clipped_N.sum() < len(SIZES)
    assert (np.abs(found.ratio_N - 1) > CLIP).sum() > found.is_clipped_N.sum()
    assert_close(found.objective_N.mean(), value, ORACLE)
    weights_BT = label_weights(found.weight_N, places, batch.labels_BT, np.float64)
    batch = jax.tree.map(jnp.asarray, batch._replace(weights_BT=weights_BT))
    run = compiled(lambda state: gradients(graphdef, state, batch, jnp.float64(0), CFG)[1])
    assert_close(jax.tree.map(jnp.negative, run(state)), expected, ORACLE)


def test_equal_rewards_have_no_advantage_and_others_have_mean_0_and_deviation_1():
    rewards_PG = np.array([[2.0, 2.0, 2.0], [0.3, 0.1 + 0.2, 0.3], [0.0, 0.0, 0.0], [1.0, 0, 5.0]])
    assert equal_groups(rewards_PG).tolist() == [True, True, True, False]
    found_PG = advantages(rewards_PG)
    np.testing.assert_array_equal(found_PG[:3], np.zeros((3, 3)))
    np.testing.assert_allclose([found_PG[3].mean(), found_PG[3].std()], [0, 1], atol=1e-12)
    assert np.argsort(found_PG[3]).tolist() == [1, 0, 2]


@pytest.mark.parametrize("size", [1e-310, 1e-200, 1e-3, 1e200, 1e308])
def test_advantages_do_not_depend_on_the_size_of_rewards(size: float):
    shares_PG = np.array([[1.0, 0.25, -1.0, 0.5]])
    np.testing.assert_allclose(advantages(size * shares_PG), advantages(shares_PG), rtol=1e-9)


def test_the_divergence_is_never_below_0_and_0_at_equality():
    size_N = np.geomspace(1e-18, 30, 60)
    difference_N = np.concatenate([[0.0], size_N, -size_N])
    found_N = divergence(difference_N)
    assert found_N[0] == 0.0
    assert (found_N >= 0).all()
    for half in (found_N[1:61], found_N[61:]):
        assert all(a <= b for a, b in pairwise(half))  # and grows on both sides
    logs = LogProbs(np.array([-3.0]), np.array([-3.0]), np.array([-3.0]))
    same = weighed(np.array([0.7]), logs, CLIP, KL)
    assert (same.kl_N[0], same.weight_N[0], same.ratio_N[0]) == (0.0, 0.7, 1.0)


@pytest.mark.parametrize(
    ("advantage", "ratio", "weight"),
    [(1, 1.5, 0), (1, 0.5, 0.5), (-1, 1.5, -1.5), (-1, 0.5, 0), (2, 1.1, 2.2), (0, 1.5, 0)],
)
def test_the_clip_stops_what_has_gone_far_enough(advantage: float, ratio: float, weight: float):
    """Towards a better answer above 1 + eps, away from a worse one below 1 - eps; not the way
    back.
    """
    logs = LogProbs(np.log([ratio]), np.zeros(1), None)
    found = weighed(np.array([float(advantage)]), logs, CLIP, 0.0)
    np.testing.assert_allclose(found.weight_N, [weight], atol=1e-12)


def test_weights_stay_finite_however_far_policies_are_apart():
    logs = LogProbs(np.array([-1e5, 0.0]), np.array([0.0, -1e5]), np.array([1e5, -1e5]))
    found = weighed(np.array([1.0, -1.0]), logs, CLIP, KL)
    for values in found:
        assert np.isfinite(np.asarray(values, np.float32)).all()


def test_drift_is_told_per_token_and_what_is_not_finite_is_infinite():
    logp_BT = np.array([[0.0, -1.0, -2.0, -3.0], [-4.0, np.nan, 0.0, 0.0]])
    places = [Place(0, 1, 4), Place(1, 0, 2)]
    found = drift(logp_BT, places, [[-1.0, -2.5, -3.25], [-4.0, -1.0]])
    np.testing.assert_allclose(found.mean_N, [0.25, np.inf])
    np.testing.assert_allclose(found.most_N, [0.5, np.inf])
    np.testing.assert_allclose(found.ratio_N[0], np.exp(0.75))


def test_label_weights_stand_at_the_answers_alone():
    _, places = packed()
    weights_BT = label_weights(np.arange(1.0, 7), places, packed()[0].labels_BT, np.float32)
    assert weights_BT.dtype == np.float32
    np.testing.assert_array_equal(weights_BT != 0, packed()[0].labels_BT >= 0)
    row, begin, _ = places[4]
    assert weights_BT[row, begin] == pytest.approx(5 * sum(size for _, size in SIZES) / 6)
