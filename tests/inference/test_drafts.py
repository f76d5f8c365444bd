"""Drafts are what the MTP modules predict over the whole text, step after step."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.requests import Request
from dsv3_jax.inference.settings import EngineConfig
from dsv3_jax.inference.weights import lay_out
from tests.inference.engines import MODEL, expected_steps
from tests.shapes import random_model

FEW = replace(MODEL, vocab_size=3)  # a draft is right now and then


def steps_of(engine: Engine) -> list[int]:
    """Grows with every step of row 0: how many tokens it took."""
    taken, go_on = [], engine.programs.go_on

    def noted(weights, state, lease, active_B, count):
        state, verdict = go_on(weights, state, lease, active_B, count)
        taken.extend(np.asarray(verdict.taken_B)[:count, 0].tolist())
        return state, verdict

    engine.programs.go_on = noted
    return taken


@pytest.mark.slow
def test_steps_take_as_many_drafts_as_full_forward_passes_say(x64: None):
    """Behind a prompt of one token, and one of three chunks."""
    model, seen = random_model(FEW, jnp.float64, seed=3), set()
    settings = EngineConfig(rows=1, page_slots=16, chunk=4, drafts=2)
    engine = Engine(lay_out(model, drafts=2), settings)
    taken = steps_of(engine)
    for prompt in (1, 9):
        tokens = np.random.default_rng(prompt).integers(0, 3, prompt).tolist()
        engine.submit(Request(tokens, 50))
        text = tokens + [token for answer in engine.run() for token in answer.tokens]
        expected = expected_steps(model, text, prompt)
        assert len(text) == prompt + 50
        assert [n for n in taken if n] == expected
        taken.clear()
        seen |= set(expected)
    assert seen == {1, 2, 3}
