"""Engines whose weights change, and engines that compute the same for a text whatever goes on."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from dsv3_jax.inference import engine as engine_module
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.programs import Programs
from dsv3_jax.inference.requests import Request
from dsv3_jax.inference.settings import EngineConfig
from dsv3_jax.inference.weights import lay_out
from tests.inference.engines import MODEL, count_compilations, programs_compiled_once
from tests.shapes import random_model

SHARING = EngineConfig(rows=1, page_slots=4, chunk=12, longest=16)
STEADY = EngineConfig(rows=8, page_slots=4, chunk=24, longest=48, steady=True, share_prefixes=False)


@pytest.fixture(scope="module", autouse=True)
def _programs():
    with programs_compiled_once():
        yield


@pytest.fixture(scope="module")
def weights():
    return lay_out(random_model(MODEL))


def drawn(count: int, seed: int) -> list[Request]:
    """Requests at temperature 1, with prompts and answers of all lengths."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 64, rng.integers(1, 24)).tolist() for _ in range(count)]
    return [Request(p, int(rng.integers(4, 24)), 1.0, seed=i) for i, p in enumerate(prompts)]


def told_by(engine: Engine, requests: Sequence[Request]) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of each."""
    ids = {engine.submit(request): i for i, request in enumerate(requests)}
    told = [([], []) for _ in requests]
    for answer in engine.run():
        told[ids[answer.id]][0].extend(answer.tokens)
        told[ids[answer.id]][1].extend(answer.logprobs)
    return told


# --- weights that change -------------------------------------------------------------------------


def test_other_weights_are_taken_without_a_compilation_and_nothing_of_the_old_ones_stays(weights):
    """Beginnings that the old weights have read are not borrowed."""
    other = lay_out(random_model(MODEL, seed=1))
    engine = Engine(weights, SHARING)
    requests = [Request([5, 6, 7, 8, 9, 1, 2, 3, i], 4) for i in range(4)]
    before = told_by(engine, requests)
    expected = told_by(Engine(other, SHARING), requests)
    told_by(engine, requests)  # now all that can be borrowed is
    with count_compilations() as compilations:
        engine.take_weights(other)
        assert told_by(engine, requests) == expected != before
    assert compilations == []
    assert engine.statistics.borrowed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"expert_hidden": 16},
            r"shared\.w_down_FD\S*: float32\[16, 32\]; allowed: float32\[12",
        ),
        ({"num_layers": 2}, r"weights\.layers\[1\]\S+: float32\S.*; allowed: none"),
    ],
)
def test_weights_of_another_model_are_refused(weights, change, said):
    engine = Engine(weights, SHARING)
    with pytest.raises(ValueError, match=said):
        engine.take_weights(lay_out(random_model(replace(MODEL, **change))))
    assert engine.weights is weights


def test_weights_are_not_taken_in_the_middle_of_a_text(weights):
    engine = Engine(weights, SHARING)
    request_id = engine.submit(Request([1], 5))
    with pytest.raises(ValueError, match="1 requests have not ended"):
        engine.take_weights(weights)
    assert engine.cancel(request_id)
    engine.take_weights(weights)


# --- steady engines ------------------------------------------------------------------------------


def test_a_steady_engine_tells_the_same_to_the_bit_whoever_the_neighbours_are(weights):
    engine, requests = Engine(weights, STEADY), drawn(20, seed=3)
    together = told_by(engine, requests)
    few = told_by(engine, [requests[i] for i in (17, 3, 11)])
    assert few == [together[i] for i in (17, 3, 11)]
    assert told_by(engine, requests[::-1]) == together[::-1]


def test_a_steady_engine_does_not_look_at_the_clock(weights, monkeypatch):
    engine, requests = Engine(weights, STEADY), drawn(12, seed=4)
    calls, real = [], Programs.go_on

    def go_on(self, weights, state, lease, active_B, count):
        calls[-1].append((int(active_B.sum()), int(count)))
        return real(self, weights, state, lease, active_B, count)

    monkeypatch.setattr(Programs, "go_on", go_on)
    told = []
    for patience in (1e-9, 1e9):
        monkeypatch.setattr(engine_module, "PATIENCE", patience)
        calls.append([])
        told.append(told_by(engine, requests))
    assert told[0] == told[1]
    assert calls[0] == calls[1]
    assert max(count for _, count in calls[0]) > 1


def test_a_steady_engine_has_two_programs_and_texts_no_longer_than_it_is_told(weights):
    engine = Engine(weights, STEADY)
    told_by(engine, drawn(12, seed=5))
    assert engine.programs.compiled == 2
    assert engine.room == 48
    assert len(told_by(engine, [Request([1] * 20, 99, 1.0)])[0][0]) == 28
    with pytest.raises(ValueError, match=r"the prompt has 25 tokens; allowed with engine\.steady"):
        engine.submit(Request([1] * 25, 5))


@pytest.mark.parametrize("change", [{"share_prefixes": True}, {"pages": 20}, {"replicas": 8}])
def test_what_would_make_a_steady_engine_unsteady_is_refused(change):
    with pytest.raises(ValueError, match=rf"engine\.{next(iter(change))} is .* engine\.steady"):
        replace(STEADY, **change)
