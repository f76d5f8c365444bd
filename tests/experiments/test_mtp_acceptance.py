"""Drafts along a text: counts without an engine are the engine's own; the experiment in small."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import numpy as np
import pytest

from dsv3_jax.config.presets import tiny_run
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.settings import EngineConfig
from dsv3_jax.inference.weights import lay_out
from dsv3_jax.model.transformer import DeepSeekV3
from tests.experiments.loading import run_module
from tests.inference.engines import MODEL
from tests.runs import jax_option
from tests.shapes import compiled, random_model

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "mtp_acceptance"
# Of four tokens, drafts of a model that was never trained often hold.
FEW_TOKENS = replace(MODEL, vocab_size=4, bos_id=0, eos_id=1, max_length=256)


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with jax_option("jax_disable_most_optimizations"):
        yield


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return run_module("mtp_acceptance", monkeypatch)


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    return random_model(FEW_TOKENS, seed=2)


@pytest.fixture(scope="module")
def engine(model: DeepSeekV3) -> Engine:
    """With one program for prompts and one for steps: compiling them is most of the time here."""
    settings = EngineConfig(rows=1, page_slots=256, chunk=64, drafts=2, share_prefixes=False)
    return Engine(lay_out(model, drafts=2), settings)


# --- arithmetic ---


def one_by_one(holds_ND: np.ndarray) -> tuple[int, list[int], list[int]]:
    """Steps, and of each draft how often it was looked at and taken: the obvious way."""
    places, drafts = holds_ND.shape
    place, steps, looked_at, taken = 0, 0, [0] * drafts, [0] * drafts
    while place < places:
        steps += 1
        made = 0
        for k in range(min(drafts, places - 1 - place)):
            looked_at[k] += 1
            if not holds_ND[place, k]:
                break
            taken[k] += 1
            made += 1
        place += made + 1
    assert place == places
    return steps, looked_at, taken


def test_replayed_steps_are_those_made_one_by_one(experiment):
    holds_BND = np.random.default_rng(0).random((20, 11, 3)) < 0.6
    found = experiment.replayed(holds_BND.astype(float))
    steps, looked_at, taken = zip(*map(one_by_one, holds_BND), strict=True)
    assert (found.steps, found.tokens) == (sum(steps), 220)
    np.testing.assert_array_equal(found.looked_at_D, np.sum(looked_at, 0))
    np.testing.assert_array_equal(found.taken_D, np.sum(taken, 0))
    assert found.tokens_per_step > 1.5


def test_replayed_chances_are_the_mean_of_all_that_may_happen(experiment):
    chance_ND = np.random.default_rng(1).random((4, 2))
    expected = np.zeros(5)
    for holds in itertools.product([0, 1], repeat=8):
        holds_ND = np.reshape(holds, (4, 2))
        steps, looked_at, taken = one_by_one(holds_ND)
        weight = np.where(holds_ND, chance_ND, 1 - chance_ND).prod()
        expected += weight * np.array([steps, *looked_at, *taken])
    found = experiment.replayed(chance_ND[None])
    np.testing.assert_allclose([found.steps, *found.looked_at_D, *found.taken_D], expected)


def test_no_steps_have_no_shares(experiment):
    found = experiment.replayed(np.zeros((2, 3, 2)))
    assert (found.steps, found.tokens) == (6, 6)
    np.testing.assert_array_equal(found.acceptance_D, [0, np.nan])
    both = experiment.together([found, experiment.replayed(np.ones((2, 3, 2)))])
    assert (both.steps, both.tokens) == (8, 12)
    np.testing.assert_array_equal(both.acceptance_D, [2 / 6, 1])


def test_chances_are_those_of_the_modules_own_predictions(experiment, model):
    """Draft k at a position: from what the module says there of the token k + 1 places on."""
    text_BT = np.random.default_rng(4).integers(0, 4, (2, 9)).astype(np.int32)
    drawn, greedy = (experiment.chances(model, text_BT, 5, greedy=way) for way in (False, True))
    assert drawn.shape == greedy.shape == (2, 3, 2)
    p_BTV, *by_module = map(np.asarray, compiled(predictions)(model, text_BT))
    for k, q_BTV in enumerate(by_module, start=1):
        for row, text_T in enumerate(text_BT):
            for newest in range(5, 9 - k):  # position of the newest token when the step begins
                token = text_T[newest + k]
                p, q = p_BTV[row, newest + k - 1, token], q_BTV[row, newest - 1, token]
                found = drawn[row, newest - 5, k - 1], greedy[row, newest - 5, k - 1]
                assert found[0] == pytest.approx(min(1, q / p), rel=1e-4)
                assert found[1] == (q_BTV[row, newest - 1].argmax() == token)


def predictions(model: DeepSeekV3, text_BT: jax.Array) -> list[jax.Array]:
    """Probabilities of the main model and of each module."""
    h_BTD, _ = model.hidden(text_BT)
    hidden = [h_BTD, *(deeper_BTD for deeper_BTD, _ in model.mtp_hidden(h_BTD, text_BT))]
    return [jax.nn.softmax(model.logits(h_BTD), axis=-1) for h_BTD in hidden]


# --- beside the engine ---


def played(experiment: ModuleType, engine: Engine, temperature: float) -> tuple[np.ndarray, int]:
    """Twelve texts of 40 prompt tokens and 60 more; the steps that the engine made of them."""
    steps, own = 0, engine.programs.go_on

    def counted(weights, state, lease, active_B, count):
        nonlocal steps
        state, verdict = own(weights, state, lease, active_B, count)
        steps += int((np.asarray(verdict.taken_B)[:count] > 0).sum())
        return state, verdict

    prompt_BT = np.random.default_rng(2).integers(0, 4, (12, 40))
    requests = experiment.requests_of(prompt_BT, 60, temperature)
    engine.programs.go_on = counted
    try:
        return experiment.written(engine, requests), steps
    finally:
        engine.programs.go_on = own


@pytest.mark.slow
def test_steps_of_greedy_texts_are_the_engines(experiment, model, engine):
    text_BT, steps = played(experiment, engine, 0.0)
    chance_BND = experiment.chances(model, text_BT, 40, greedy=True)
    assert chance_BND.shape == (12, 59, 2)
    found = experiment.replayed(chance_BND)
    assert found.steps == steps
    assert (found.acceptance_D > 0.2).all()
    assert (found.acceptance_D < 0.8).all()


@pytest.mark.slow
def test_steps_of_drawn_texts_are_the_engines_within_chance(experiment, model, engine):
    text_BT, steps = played(experiment, engine, 1.0)
    found = experiment.replayed(experiment.chances(model, text_BT, 40, greedy=False))
    # Some 350 steps of 2.0 tokens, with a deviation of 0.8: a sigma of their number is 8.
    assert abs(found.steps - steps) < 40
    greedy = experiment.replayed(experiment.chances(model, text_BT, 40, greedy=True))
    assert abs(greedy.steps - steps) > 80, "else the tolerance tells nothing"


# --- the command ---


@pytest.mark.slow
def test_the_experiment_in_small(experiment, model, engine, monkeypatch, capsys):
    of = SimpleNamespace(model=model, cfg=replace(tiny_run(), model=model.cfg), step=7)
    prompt_BT = np.random.default_rng(3).integers(0, 4, (2, experiment.PROMPT))
    monkeypatch.setattr(experiment, "trained", lambda path: of)
    monkeypatch.setattr(
        experiment, "prompts_of", lambda of, count: {experiment.HELD_OUT: prompt_BT}
    )
    made = experiment.engines_of(of, 1)
    assert [len(one.weights.depths) for one in made] == [0, 1, 2]
    monkeypatch.setattr(experiment, "engines_of", lambda of, rows: [engine, engine])
    experiment.main("--runs some-001 --texts 2 --rows 1 --tokens 72 --rounds 2".split())
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "step 7" in line]
    assert [line[1] for line in lines] == ["held out", "held out", "all", "all", "1", "1"]
    assert [line[2] for line in lines[:4]] == ["0", "1", "0", "1"]
    assert all(line[3].count("%") == 2 for line in lines[:4])
    assert all(1 <= float(line[-1].strip(" |")) <= 3 for line in lines)
    assert not engine.pending


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--tokens", "64"), "--tokens is 64; allowed: at least 128 with such --rows"),
        (("--rows", "17"), "--rows is (17,); allowed: 1 to --texts, 16"),
        (("--runs", "gone"), "gone"),
    ],
)
def test_what_cannot_be_measured_is_told_in_a_line(experiment, options, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        experiment.main(list(options))
    assert said in capsys.readouterr().err
