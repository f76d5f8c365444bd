"""Log-likelihoods: the model's own, whatever rows stand beside, and the same on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import MeshConfig
from dsv3_jax.evaluate import scoring
from dsv3_jax.evaluate.scoring import Row, Scorer, lengths
from dsv3_jax.inference.weights import lay_out
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.parallel.mesh import make_mesh
from tests.inference.conftest import _quick  # noqa: F401
from tests.jaxprs import intermediates
from tests.shapes import compiled, random_model, tiny_model

CFG = tiny_model(num_layers=2, mtp_depth=0, max_length=24)
LONGEST = CFG.max_length


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    return random_model(CFG)


@pytest.fixture(scope="module")
def scorer(model) -> Scorer:
    return Scorer(lay_out(model), rows=2)


def make_rows() -> list[Row]:
    """Of many lengths, with labels here and there; some of the same tokens."""
    draw = np.random.default_rng(0)
    rows = []
    for length in (1, 5, 16, 17, 20, 24, 24, 24):
        tokens = draw.integers(0, CFG.vocab_size, length).tolist()
        labels = draw.integers(-1, CFG.vocab_size, length)
        labels[: length // 2] = -1
        rows.append(Row(tokens, labels.tolist()))
    again = [Row(rows[4].tokens, [-1] * 19 + [label]) for label in range(4)]
    return [*again, *rows]


def expected_of(model: DeepSeekV3, row: Row) -> tuple[np.ndarray, bool]:
    """From the logits of the row alone, all of them."""
    padded_1T = np.zeros((1, CFG.max_length), np.int32)
    padded_1T[0, : len(row.tokens)] = row.tokens
    logits_TV = np.asarray(LOGITS(model, padded_1T))[0, : len(row.tokens)]
    asked_T = np.array(row.labels) >= 0
    labels_N = np.array(row.labels)[asked_T]
    logprob_NV = np.asarray(jax.nn.log_softmax(jnp.asarray(logits_TV[asked_T]), -1))
    greedy = (logits_TV[asked_T].argmax(-1) == labels_N).all()
    return logprob_NV[np.arange(len(labels_N)), labels_N], bool(greedy)


LOGITS = compiled(lambda model, tokens_BT: model(tokens_BT))


def test_scores_are_the_models_own(model, scorer):
    rows = make_rows()
    likeliest = np.asarray(LOGITS(model, np.array([rows[-1].tokens])))[0].argmax(-1).tolist()
    rows.append(Row(rows[-1].tokens, likeliest))
    told = []
    found = scorer.score(rows, told.append)
    assert told[-1] == len(rows)
    assert told == sorted(told)
    for row, scored in zip(rows, found, strict=True):
        logprob_N, greedy = expected_of(model, row)
        np.testing.assert_allclose(scored.logprob_N, logprob_N, atol=2e-5)
        assert scored.likeliest == greedy
    assert found[-1].likeliest
    assert not all(scored.likeliest for scored in found)


def test_few_logits_at_a_time_give_the_same(model, scorer, monkeypatch):
    rows = make_rows()[-2:]
    expected = scorer.score(rows)
    monkeypatch.setattr(scoring, "MOST_LOGITS", 7 * CFG.vocab_size)  # chunks of 7 positions
    for one, other in zip(Scorer(lay_out(model), rows=2).score(rows), expected, strict=True):
        np.testing.assert_allclose(one.logprob_N, other.logprob_N, atol=1e-5)
        assert one.likeliest == other.likeliest


def test_chunks_hold_no_more_logits_than_they_may(model, monkeypatch):
    """No array of a program has the vocabulary beside more than 7 positions."""
    monkeypatch.setattr(scoring, "MOST_LOGITS", 7 * CFG.vocab_size)
    rows = np.zeros((2, LONGEST), np.int32), np.full(2, LONGEST), np.zeros((2, LONGEST, 1), int)
    made = {array.shape for array in intermediates(scoring.likelihoods, lay_out(model), *rows)}
    assert {shape for shape in made if shape[-1:] == (CFG.vocab_size,)} == {(7, CFG.vocab_size)}


@pytest.mark.slow
def test_a_mesh_scores_the_same(model, scorer):
    mesh = make_mesh(MeshConfig(data=2, local=2))
    rows = make_rows()[-4:]
    found = Scorer(lay_out(model), mesh, rows=1).score(rows)
    for one, other in zip(found, scorer.score(rows), strict=True):
        np.testing.assert_allclose(one.logprob_N, other.logprob_N, atol=1e-5)
        assert one.likeliest == other.likeliest


def test_a_row_that_does_not_fit_is_refused(scorer):
    for row in (Row([], []), Row([1] * 25, [1] * 25), Row([1], [1, 2])):
        with pytest.raises(ValueError, match=r"allowed: as many of both, 1 to .* = 24"):
            scorer.score([row])


def test_lengths_grow_by_halves_up_to_the_longest():
    assert lengths(100) == (16, 24, 32, 48, 64, 96, 100)
    assert lengths(16) == (16,)
    assert lengths(5) == (5,)
