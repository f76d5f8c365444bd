"""The objective of group relative policy optimisation, on the host in float64 (report 5.2.2).

Of G answers o_i to a question q, rewarded r_i (Eq. 26-28, at the level of whole answers):

    rho_i = pi(o_i|q) / pi_old(o_i|q),   A_i = (r_i - mean(r)) / std(r)
    J = mean_i min(rho_i A_i, clip(rho_i, 1 - eps, 1 + eps) A_i) - beta KL_i
    KL_i = pi_ref/pi - log(pi_ref/pi) - 1   at o_i

Its gradient is that of a weighted cross-entropy: mean_i w_i grad log pi(o_i|q) with

    w_i = rho_i A_i, where the minimum is not the clipped term, + beta (pi_ref/pi - 1)

so one training step, whatever its mesh, schedule and recipe, needs w_i for each label of o_i alone.
`std` is the population's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Of log-probabilities of whole answers, in nats: e^20 keeps weights finite in float32.
MOST_DIFFERENCE = 20.0
# A group's rewards that differ by less, as a share of the largest, are equal: 0.1 + 0.2 and 0.3.
ROUNDING = 1e-9


def advantages(rewards_PG: np.ndarray) -> np.ndarray:
    """A [P, G] of the rewards of P groups; 0 in groups whose rewards are equal."""
    rewards_PG = np.asarray(rewards_PG, np.float64)
    # A has no scale; by a power of two, exact, the squares of small and large ones stay in range.
    _, exponent_P1 = np.frexp(np.abs(rewards_PG).max(1, keepdims=True))
    rewards_PG = np.ldexp(rewards_PG, -exponent_P1)
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdims=True)
    std_P1 = np.sqrt((centred_PG**2).mean(1, keepdims=True))
    differ_P1 = ~equal_groups(rewards_PG)[:, None]
    return np.where(differ_P1, centred_PG / np.where(differ_P1, std_P1, 1), 0.0)


def equal_groups(rewards_PG: np.ndarray) -> np.ndarray:
    """bool [P]: whether a group's rewards are equal but for rounding."""
    spread_P = rewards_PG.max(1) - rewards_PG.min(1)
    return spread_P <= ROUNDING * np.abs(rewards_PG).max(1)


class LogProbs(NamedTuple):
    """log pi(o_i|q) of N answers, float64 [N], by the policy that is trained, by itself before the
    first update on these answers, and by the reference; None where beta is 0.
    """

    new_N: np.ndarray
    old_N: np.ndarray
    reference_N: np.ndarray | None


class Weighed(NamedTuple):
    """Of N answers, [N] each."""

    weight_N: np.ndarray
    """w_i"""
    objective_N: np.ndarray
    """The summand of J"""
    kl_N: np.ndarray
    """0 or more; 0 without a reference"""
    ratio_N: np.ndarray
    """rho_i"""
    is_clipped_N: np.ndarray
    """bool: whether the minimum is the clipped term, which has no gradient"""


def weighed(advantage_N: np.ndarray, logs: LogProbs, clip: float, kl: float) -> Weighed:
    """Each answer's part in J and in its gradient."""
    ratio_N = np.exp(_bounded(logs.new_N - logs.old_N))
    plain_N = ratio_N * advantage_N
    clipped_N = np.clip(ratio_N, 1 - clip, 1 + clip) * advantage_N
    is_clipped_N = clipped_N < plain_N
    weight_N, objective_N = np.where(is_clipped_N, 0.0, plain_N), np.minimum(plain_N, clipped_N)
    kl_N = np.zeros_like(ratio_N)
    if logs.reference_N is not None:
        difference_N = _bounded(logs.reference_N - logs.new_N)
        kl_N = divergence(difference_N)
        weight_N = weight_N + kl * np.expm1(difference_N)
        objective_N = objective_N - kl * kl_N
    return Weighed(weight_N, objective_N, kl_N, ratio_N, is_clipped_N)


def divergence(difference_N: np.ndarray) -> np.ndarray:
    """pi_ref/pi - log(pi_ref/pi) - 1 of log(pi_ref/pi): an estimate of KL(pi || pi_ref) that is
    never below 0, and 0 where both agree.
    """
    return np.maximum(np.expm1(difference_N) - difference_N, 0.0)  # rounding may go below


def _bounded(difference_N: np.ndarray) -> np.ndarray:
    return np.clip(difference_N, -MOST_DIFFERENCE, MOST_DIFFERENCE)


class Place(NamedTuple):
    """Where an answer is predicted: `labels_BT[row, begin:end]` are its tokens."""

    row: int
    begin: int
    end: int


def sums_of(logp_BT: np.ndarray, places: Sequence[Place]) -> np.ndarray:
    """log pi(o_i|q), float64 [N], from log p of each label."""
    return np.array([logp_BT[row, begin:end].sum(dtype=np.float64) for row, begin, end in places])


def label_weights(
    weight_N: np.ndarray, places: Sequence[Place], labels_BT: np.ndarray, dtype: np.dtype
) -> np.ndarray:
    """[B, T]: with them a step's main loss, the sum of weight * -log p over the number of its
    labels, has the gradient of -J.
    """
    weights_BT = np.zeros(labels_BT.shape, dtype)
    factor = np.count_nonzero(labels_BT >= 0) / len(weight_N)
    for weight, (row, begin, end) in zip(weight_N, places, strict=True):
        weights_BT[row, begin:end] = weight * factor
    return weights_BT


class Drift(NamedTuple):
    """How far the engine's log-probabilities are from the training's, per answer [N]."""

    mean_N: np.ndarray
    """Of the absolute differences of its tokens, in nats"""
    most_N: np.ndarray
    ratio_N: np.ndarray
    """pi by the training over pi by the engine, of whole answers"""


def drift(logp_BT: np.ndarray, places: Sequence[Place], drawn: Sequence[Sequence[float]]) -> Drift:
    """`drawn`: of each answer's tokens what the engine said. Infinite for what is not finite."""
    differences = [
        logp_BT[place.row, place.begin : place.end].astype(np.float64) - np.asarray(said)
        for place, said in zip(places, drawn, strict=True)
    ]
    sizes = [np.nan_to_num(np.abs(one), nan=np.inf, posinf=np.inf) for one in differences]
    return Drift(
        np.array([size.mean() for size in sizes]),
        np.array([size.max() for size in sizes]),
        np.array([np.exp(_bounded(np.nan_to_num(one).sum())) for one in differences]),
    )
