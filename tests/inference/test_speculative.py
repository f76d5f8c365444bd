"""Drafts change how fast a text comes, and nothing else: the same greedy tokens, the same
distribution of sampled ones.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference.sampling import RowSampling, choose, nucleus, sampling
from dsv3_jax.inference.speculative import Verdict, draw_draft, verify
from tests.shapes import compiled, normal

ROWS, VOCAB = 40_000, 6
P_JV, Q_DV = normal(1, 3, VOCAB), normal(2, 2, VOCAB)  # logits of the model and of two drafts


def row_sampling(rows: int, temperature: float = 0.0, top_p: float = 1.0) -> RowSampling:
    """Of rows with seeds 0, 1, 2 ..."""
    return RowSampling(
        jnp.arange(rows, dtype=jnp.uint32),
        jnp.full(rows, temperature, jnp.float32),
        jnp.full(rows, top_p, jnp.float32),
    )


def drafted(how: RowSampling) -> np.ndarray:
    """int32 [B, D]: drafts behind position 7, each from its own logits."""
    rows = len(how.seed_B)
    how = jax.tree.map(lambda x: jnp.resize(x, ROWS), how)
    draft_BD = np.stack([_drafted(logits_V, 7 + k, how) for k, logits_V in enumerate(Q_DV)], 1)
    return draft_BD[:rows]


@compiled
def _drafted(logits_V, position, how):
    return draw_draft(jnp.tile(logits_V[None], (ROWS, 1)), jnp.full(ROWS, position), how)


def judged(
    how: RowSampling, draft_BD: jax.Array, allowed: int = 2, q_DV: jax.Array = Q_DV
) -> Verdict:
    """Filled up to `ROWS`: one program for all tests. Two likeliest tokens are told of."""
    rows = len(draft_BD)
    how, draft_BD = jax.tree.map(lambda x: jnp.resize(x, (ROWS, *x.shape[1:])), (how, draft_BD))
    verdict = _judged(P_JV, q_DV, how, draft_BD, allowed)
    return jax.tree.map(lambda x: np.asarray(x)[:rows], verdict)


@compiled
def _judged(p_JV, q_DV, how, draft_BD, allowed):
    p_BJV, q_BDV = (jnp.tile(x[None], (ROWS, 1, 1)) for x in (p_JV, q_DV))
    seven_B = jnp.full(ROWS, 7, jnp.int32)
    return verify(p_BJV, draft_BD, q_BDV, jnp.full(ROWS, allowed), seven_B, how, top=2)


def assert_drawn_from(tokens: np.ndarray, p_V: np.ndarray) -> None:
    """Each token's share is within 5 standard deviations of its probability."""
    share_V = np.bincount(tokens, minlength=VOCAB) / len(tokens)
    deviation_V = np.sqrt(p_V * (1 - p_V) / len(tokens))
    assert (np.abs(share_V - p_V) <= 5 * deviation_V + 1e-7).all(), (share_V, p_V)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.3, 0.7)])
def test_what_is_drawn_with_drafts_has_the_models_own_distribution(temperature, top_p):
    """First, second and third tokens, whatever was drafted; and as many drafts are taken as can be
    without changing it: sum of min(p, q).
    """
    how = row_sampling(ROWS, temperature, top_p)
    verdict = judged(how, drafted(how))
    p_JV, q_DV = (
        np.asarray(jax.nn.softmax(nucleus(x / temperature, jnp.float32(top_p))))
        for x in (P_JV, Q_DV)
    )
    for j in range(3):
        there = verdict.taken_B > j
        assert_drawn_from(verdict.token_BJ[there, j], p_JV[j])
        if j < 2:
            accepted = np.mean(verdict.taken_B[there] > j + 1)
            expected = np.minimum(p_JV[j], q_DV[j]).sum()
            assert abs(accepted - expected) < 5 * np.sqrt(0.25 / there.sum())
    assert 0.2 < np.mean(verdict.taken_B > 1) < 0.95


def test_drafts_from_nan_change_nothing_of_what_is_drawn():
    how = row_sampling(ROWS, 1.0)
    verdict = judged(how, jnp.zeros((ROWS, 2), jnp.int32), q_DV=np.nan * Q_DV)
    assert (verdict.taken_B == 1).all()
    assert_drawn_from(verdict.token_BJ[:, 0], np.asarray(jax.nn.softmax(P_JV[0])))


def test_tokens_of_one_step_are_drawn_independently():
    """Or a text's own distribution would be another than the product of its tokens'."""
    how = row_sampling(ROWS, 1.0)
    verdict = judged(how, drafted(how))
    p_JV = np.asarray(jax.nn.softmax(P_JV))
    for first in range(VOCAB):
        there = (verdict.taken_B > 1) & (verdict.token_BJ[:, 0] == first)
        if there.sum() > 500:
            assert_drawn_from(verdict.token_BJ[there, 1], p_JV[1])


def test_greedy_rows_take_drafts_as_long_as_these_are_the_models_choice():
    best_J = np.asarray(P_JV.argmax(-1))
    other = (best_J + 1) % VOCAB
    draft_BD = jnp.asarray(
        [[best_J[0], best_J[1]], [best_J[0], other[1]], [other[0], best_J[1]]], jnp.int32
    )
    verdict = judged(row_sampling(3), draft_BD)
    assert verdict.taken_B.tolist() == [3, 2, 1]
    for row, taken in enumerate(verdict.taken_B.tolist()):
        assert verdict.token_BJ[row, :taken].tolist() == best_J[:taken].tolist()
    assert judged(row_sampling(3), draft_BD, 1).taken_B.tolist() == [2, 2, 1]
    assert judged(row_sampling(3), draft_BD, 0).taken_B.tolist() == [1, 1, 1]


def test_a_batch_may_hold_greedy_rows_and_others():
    how = row_sampling(8)
    mixed = how._replace(temperature_B=how.temperature_B.at[4:].set(1.0))
    draft_BD = drafted(mixed)
    warm = judged(mixed._replace(temperature_B=jnp.ones(8)), draft_BD)
    cold, both = judged(how, draft_BD), judged(mixed, draft_BD)
    for name in ("token_BJ", "taken_B", "logprob_BJ"):
        found, expected = getattr(both, name), getattr(cold, name)
        assert np.array_equal(found[:4], expected[:4])
        assert np.array_equal(found[4:], getattr(warm, name)[4:])


@pytest.mark.parametrize("drafts", [0, 2])
def test_where_no_draft_is_looked_at_the_token_is_that_of_plain_sampling(drafts: int):
    how = row_sampling(16, 0.8, 0.9)
    logits_BJV = jnp.tile(P_JV[None, : drafts + 1], (16, 1, 1))
    draft_BD, q_BDV = drafted(how)[:, :drafts], jnp.tile(Q_DV[None, :drafts], (16, 1, 1))
    zeros = jnp.zeros(16, jnp.int32)
    verdict = compiled(verify)(logits_BJV, draft_BD, q_BDV, zeros, zeros + 7, how)
    for seed in range(16):
        plain = choose(P_JV[None, 0], jnp.int32(7), sampling(seed, 0.8, 0.9))
        assert verdict.token_BJ[seed, 0] == plain[0]


def test_a_token_that_the_model_never_takes_is_never_accepted():
    """Beyond the nucleus p is 0, and a uniform number may be 0 too."""
    how = row_sampling(4000, 1.0, 0.3)
    kept = np.flatnonzero(np.isfinite(np.asarray(nucleus(P_JV[:1], jnp.float32(0.3))))[0])
    outside = next(i for i in range(VOCAB) if i not in kept)
    verdict = judged(how, jnp.full((4000, 2), outside, jnp.int32))
    assert (verdict.taken_B == 1).all()
    assert np.isin(verdict.token_BJ[:, 0], kept).all()


def test_log_probabilities_are_those_at_temperature_one_and_the_likeliest_stand_beside_them():
    how = row_sampling(5, 0.7, 0.9)
    verdict = judged(how, drafted(how))
    logprob_JV = np.asarray(jax.nn.log_softmax(P_JV))
    for row in range(5):
        for j in range(int(verdict.taken_B[row])):
            token = int(verdict.token_BJ[row, j])
            assert abs(float(verdict.logprob_BJ[row, j]) - logprob_JV[j, token]) < 1e-6
            best = np.argsort(-logprob_JV[j])[:2]
            assert verdict.top_BJn[row, j].tolist() == best.tolist()
            np.testing.assert_allclose(verdict.top_logprob_BJn[row, j], logprob_JV[j, best], 1e-5)
