"""Scores are those of the whole model; who knows the answers finds all, who guesses finds none."""

from collections.abc import Iterator

import jax
import numpy as np
import pytest

from dsv3_jax.evaluate import needle_scores
from dsv3_jax.evaluate.needle_scores import (
    Cell,
    Score,
    mean_score,
    score_cells,
    score_prompts,
    scorer_of,
)
from dsv3_jax.evaluate.needles import Place, Prompt, Sentence
from tests.runs import jax_option
from tests.shapes import compiled, random_model, random_tokens, tiny_model

CFG = tiny_model(num_layers=1, num_dense_layers=0, mtp_depth=0)


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with jax_option("jax_disable_most_optimizations"):
        yield


def prompt(tokens_T: np.ndarray, answer: int) -> Prompt:
    return Prompt(np.asarray(tokens_T, np.int32), answer, slice(0, 1), Sentence("", "", ""))


def test_scores_equal_those_of_the_whole_logits(monkeypatch):
    monkeypatch.setattr(needle_scores, "TOKENS", 3 * 24)  # three rows a pass: the last has one
    model = random_model(CFG, seed=3)
    tokens_BT = np.array(random_tokens(CFG, 7, 24))
    whole = compiled(lambda model, tokens_BT: model(tokens_BT))
    for place in (-2, -1):  # else hits would be rare
        tokens_BT[:2, place] = np.asarray(whole(model, tokens_BT))[:2, place - 1].argmax(-1)
    logits_BTV = np.asarray(whole(model, tokens_BT), np.float64)
    answers = [2, 3, 1, 2, 3, 4, 1]
    found = list(
        score_prompts(scorer_of(model), [prompt(*p) for p in zip(tokens_BT, answers, strict=True)])
    )
    assert len(found) == 7
    hits = 0
    for one, tokens_T, logits_TV, answer in zip(found, tokens_BT, logits_BTV, answers, strict=True):
        log_p_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        likeliest, log_ps = [], []
        for place in range(24 - answer, 24):
            likeliest.append(logits_TV[place - 1].argmax() == tokens_T[place])
            log_ps.append(log_p_TV[place - 1, tokens_T[place]])
        hits += sum(likeliest)
        assert (one.exact, one.tokens) == (all(likeliest), np.mean(likeliest))
        assert one.logprob == pytest.approx(np.mean(log_ps), abs=1e-4)
    assert 0 < hits < sum(answers)


def test_logits_are_made_at_the_answer_alone():
    model = jax.eval_shape(lambda: random_model(CFG))
    tokens_BT = jax.ShapeDtypeStruct((2, 48), np.int32)
    jaxpr = jax.make_jaxpr(needle_scores._at_the_end, static_argnums=2)(model, tokens_BT, 3)
    sizes = {v.aval.shape for eqn in jaxpr.eqns[0].params["jaxpr"].eqns for v in eqn.outvars}
    vocabulary = {shape for shape in sizes if CFG.vocab_size in shape[-1:]}
    assert (2, 3, CFG.vocab_size) in vocabulary
    assert max(np.prod(shape) for shape in vocabulary) == 2 * 3 * CFG.vocab_size


PLACES = [Place(length, depth) for length in (20, 30) for depth in (0.0, 1.0)]


@pytest.fixture
def prompts() -> dict[Place, list[Prompt]]:
    rng = np.random.default_rng(0)
    return {
        place: [prompt(rng.integers(0, 50, place.length), 3) for _ in range(4)] for place in PLACES
    }


def test_who_knows_the_answers_finds_all_and_who_guesses_none(prompts):
    def knows(tokens_BT, answer):
        return np.ones((len(tokens_BT), answer), bool), np.zeros((len(tokens_BT), answer))

    rng = np.random.default_rng(1)

    def guesses(tokens_BT, answer):
        hit_BA = rng.integers(0, 50, (len(tokens_BT), answer)) == tokens_BT[:, -answer:]
        return hit_BA, np.full((len(tokens_BT), answer), -np.log(50))

    told = []
    cells = score_cells(knows, prompts, told.append)
    assert cells == [Cell(place, 4, Score(1.0, 1.0, 0.0)) for place in PLACES]
    assert told == list(range(1, 17))
    for cell in score_cells(guesses, prompts, told.append):
        assert cell.score.exact == 0
        assert cell.score.tokens < 0.3
        assert cell.score.logprob == pytest.approx(-np.log(50))


def test_a_cell_has_the_means_of_its_own_prompts(prompts):
    def by_sum(tokens_BT, answer):
        """Hits and log-probabilities that tell a row from others."""
        places_A = np.arange(answer)
        hit_BA = tokens_BT[:, -answer:] % 2 == 0
        return hit_BA, -tokens_BT.sum(1)[:, None] - places_A[None].astype(float)

    for cell in score_cells(by_sum, prompts, lambda done: None):
        rows_BT = np.stack([one.tokens_T for one in prompts[cell.place]])
        even_BA = rows_BT[:, -3:] % 2 == 0
        expected = even_BA.all(1).mean(), even_BA.mean(), -rows_BT.sum(1).mean() - 1
        assert cell.score == pytest.approx(Score(*expected))
    assert mean_score([Score(1, 1, -1), Score(0, 0.5, -2)]) == Score(0.5, 0.75, -1.5)
