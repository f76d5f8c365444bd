"""What an engine's programs did is counted by rows, and compilation is no part of their time."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from dsv3_jax.inference import tally as tally_module
from dsv3_jax.inference.programs import Programs
from dsv3_jax.inference.tally import Tally, counted_engine

# Three rows, of which the last is not active, and steps of which two were made.
TAKEN_NB = np.array([[3, 1, 0], [2, 0, 0], [9, 9, 9]])


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> tuple[Programs, Tally]:
    def engine(weights, settings, mesh):
        return SimpleNamespace(programs=Programs(None, mesh, 0))

    def go_on(self, weights, state, lease, active_B, count):
        self._compile("go_on")
        return state, SimpleNamespace(taken_B=TAKEN_NB)

    monkeypatch.setattr(tally_module, "Engine", engine)
    monkeypatch.setattr(tally_module.jax, "block_until_ready", lambda x: x)
    monkeypatch.setattr(Programs, "read", lambda self, *args: (None, []))
    monkeypatch.setattr(Programs, "go_on", go_on)
    monkeypatch.setattr(Programs, "_compile", lambda self, *args: time.sleep(0.2))
    made, tally = counted_engine(None, SimpleNamespace(drafts=2), None)
    return made.programs, tally


def test_steps_count_for_every_row_that_took_part(counted):
    programs, tally = counted
    assert tally.accepted is None
    for _ in range(2):
        programs.go_on(None, None, None, None, 2)
    assert (tally.decoded, tally.steps, tally.accepted) == (12, 6, 1.0)
    assert 0 < tally.decoding < tally.compiling


def test_tokens_of_chunks_are_counted_as_they_are_read(counted):
    programs, tally = counted
    chunks = [SimpleNamespace(count_B=np.array(counts)) for counts in ([3, 0], [5, 1])]
    programs.read(None, None, chunks, [], True)
    assert tally.read == 9
    assert tally.prefill > 0
    assert tally.decoded == 0
