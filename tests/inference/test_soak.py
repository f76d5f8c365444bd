"""Requests come, go and are cancelled for a long time: nothing leaks, nothing is compiled anew."""

import gc
from pathlib import Path

import pytest

from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.settings import EngineConfig
from dsv3_jax.inference.weights import lay_out
from tests.inference.engines import MODEL, check_texts, count_compilations, play, random_requests
from tests.shapes import random_model


def resident() -> int:
    """Bytes of this process that are in memory."""
    gc.collect()
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


@pytest.mark.parametrize(
    "requests",
    [
        pytest.param(100, marks=pytest.mark.slow),
        pytest.param(2000, marks=[pytest.mark.exhaustive, pytest.mark.timeout(3600)]),
    ],
)
def test_a_long_service_leaks_no_page_no_memory_and_compiles_nothing(requests: int):
    """One turn in five cancels a request. `play` accounts for every page after every turn."""
    model = random_model(MODEL)
    settings = EngineConfig(rows=4, page_slots=4, pages=20, chunk=16, drafts=1)
    engine = Engine(lay_out(model, drafts=1), settings)
    engine.warm_up()
    memory, texts = [], {}
    with count_compilations() as compiled:
        for quarter in range(4):
            texts = play(
                engine,
                random_requests(MODEL, requests // 4, seed=quarter),
                seed=quarter,
                cancels=0.2,
            )
            memory.append(resident())
    assert not compiled
    assert engine.statistics.requests == requests
    assert engine.statistics.gave_up > requests // 50
    cancelled = sum(one.ended == "cancelled" for one in texts.values())
    assert cancelled > len(texts) // 20
    assert check_texts(model, texts) == 0
    assert memory[-1] < 1.02 * memory[0], memory
