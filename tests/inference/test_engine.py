"""Texts of an engine are those of the model alone, whoever else is served."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config.mesh import MeshConfig
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.requests import Request
from dsv3_jax.inference.settings import EngineConfig, bucket, buckets
from dsv3_jax.inference.weights import lay_out
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.parallel.mesh import make_mesh
from tests.inference.engines import (
    LARGER,
    MODEL,
    check_texts,
    count_compilations,
    play,
    random_requests,
)
from tests.shapes import random_model

# 20 pages of 4 tokens for 4 rows of up to 64: texts run out of them, and give up their own.
SMALL = {"rows": 4, "page_slots": 4, "pages": 20, "chunk": 16}


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    return random_model(MODEL)


def engine_of(
    model: DeepSeekV3, drafts: int, mesh: MeshConfig | None = None, **settings: object
) -> Engine:
    made = make_mesh(mesh, jax.devices()) if mesh else None
    settings = EngineConfig(drafts=drafts, **(SMALL | settings))
    return Engine(lay_out(model, drafts=drafts), settings, made)


@pytest.fixture(scope="module")
def with_drafts(model: DeepSeekV3) -> Engine:
    return engine_of(model, 2)


def test_greedy_texts_with_two_drafts_are_the_models_own(model, with_drafts):
    """Joins, cancellations, shared beginnings, chunks of prompts, pages that run out."""
    told = play(with_drafts, random_requests(MODEL, 24, seed=1))
    assert check_texts(model, told) == 0
    assert {one.ended for one in told.values()} == {"stop", "length", "cancelled"}


def test_whoever_cancels_while_answers_come_hears_no_more(with_drafts):
    first, second = (with_drafts.submit(Request([7, 8, i], 9)) for i in range(2))
    heard = []
    for answer in with_drafts.run():
        heard.append(answer.id)
        if answer.id == first:
            with_drafts.cancel(first)
            with_drafts.cancel(second)
    assert heard == [first]


def test_what_an_engine_has_done_is_counted(model, with_drafts):
    before = copy.deepcopy(with_drafts.statistics)
    told = play(with_drafts, random_requests(MODEL, 8, seed=9), cancels=0)
    done = with_drafts.statistics
    assert done.requests - before.requests == 8
    assert done.written - before.written == sum(len(one.tokens) for one in told.values())
    assert done.stepped == done.steps + sum(done.accepted)
    assert done.offered[1] <= done.accepted[0] <= done.offered[0] <= done.steps
    assert done.acceptance[0] == done.accepted[0] / done.offered[0]


def test_warmed_up_an_engine_compiles_nothing_more(with_drafts):
    """Whatever comes; and rows in which nobody is change nothing."""
    told = []
    before = jax.tree.map(np.asarray, with_drafts.state.pools)
    with_drafts.warm_up(lambda done, all_: told.append((done, all_)))
    assert told[-1] == (len(told) - 1, len(told) - 1)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, with_drafts.state.pools))
    compiled = with_drafts.programs.compiled
    with count_compilations() as events:
        jnp.arange(977) * 3  # what it hears
        heard = len(events)
        play(with_drafts, random_requests(MODEL, 20, seed=2), seed=5)
    assert with_drafts.programs.compiled == compiled
    assert heard
    assert len(events) == heard


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request([], 5), "the prompt is empty; allowed: 1 token or more"),
        (Request([1] * 64, 5), "the prompt has 64 tokens; allowed: below 64"),
        (Request([1, 64], 5), "token id 64; allowed: 0 to 63"),
        (Request([1], 0), "max_tokens is 0; allowed: 1 or more"),
        (Request([1], 5, end_ids=frozenset([99])), "token id 99; allowed: 0 to 63"),
        (Request([1], 5, temperature=-1.0), "temperature is -1.0; allowed: from 0"),
        (Request([1], 5, top_p=0.0), "top-p is 0.0; allowed: above 0"),
        (Request([1], 5, seed=-1), "seed is -1; allowed: 0 to"),
        (Request([1.5], 5), "token id 1.5; allowed: 0 to 63"),
        (Request([True], 5), "token id True; allowed: 0 to 63"),
        (Request([1], 2.5), "max_tokens is 2.5; allowed: 1 or more"),
        (Request([1], 5, seed=0.5), "seed is 0.5; allowed: 0 to"),
    ],
)
def test_what_cannot_be_served_is_refused_and_the_engine_goes_on(with_drafts, request_, said):
    kept = with_drafts.submit(Request([1, 2, 3], 2))
    with pytest.raises(ValueError, match=said):
        with_drafts.submit(request_)
    assert [token for answer in with_drafts.run() for token in answer.tokens if answer.id == kept]


@pytest.mark.parametrize(
    "settings",
    [{"pages": None, "page_slots": 64, "chunk": 256}, {"pages": 3, "chunk": 256}],
    ids=str,
)
def test_a_chunk_may_be_larger_than_any_text(model, monkeypatch, settings):
    """Then there are no programs for more tokens than a text can have."""
    engine, sizes = engine_of(model, 0, **settings), set()
    monkeypatch.setattr(engine, "_run_read", lambda turns, counts, size, *_: sizes.add(size))
    monkeypatch.setattr(engine, "_run_go_on", lambda *_: None)
    monkeypatch.setattr(engine.mover, "warm_up", lambda weights, state: state)
    engine.warm_up()
    assert max(sizes) == min(
        MODEL.max_length, engine.scheduler.pages[0].count * settings.get("page_slots", 4)
    )


def test_a_prompt_is_copied_for_who_asks_may_go_on_with_the_list(with_drafts):
    request = Request([1, 2, 3], 4)
    request_id = with_drafts.submit(request)
    request.prompt.append(4)
    assert with_drafts._texts[request_id].request.prompt == (1, 2, 3)
    assert with_drafts.cancel(request_id)


def test_weights_are_laid_out_for_as_many_drafts_as_the_engine_makes(model):
    weights = lay_out(model, drafts=1)
    for drafts in (0, 2):
        said = f"engine.drafts is {drafts}; allowed: 1, the MTP modules that are laid out"
        with pytest.raises(ValueError, match=said):
            Engine(weights, EngineConfig(drafts=drafts))


def test_a_text_that_the_cache_can_never_hold_is_refused(model):
    engine = engine_of(model, 0, pages=3)
    with pytest.raises(ValueError, match=r"a text of 20 tokens, .* at most the 12 that the cache"):
        engine.submit(Request([1] * 10, 10))


def test_sizes_grow_by_factors_of_four():
    assert buckets(64) == (1, 4, 16, 64)
    assert buckets(20) == (1, 4, 16, 20)
    assert buckets(1) == (1,)
    assert [bucket(n, buckets(20)) for n in (1, 2, 16, 17)] == [1, 4, 16, 20]


@pytest.mark.exhaustive
def test_texts_on_eight_devices_are_the_models_own(model):
    """Experts over 2 x 2 devices, twice; chunks of two prompts in one program."""
    engine = engine_of(model, 1, MeshConfig(data=2, node=2, local=2), rows=2, prompt_microbatches=2)
    told = play(engine, random_requests(MODEL, 24, seed=3))
    assert check_texts(model, told) == 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("drafts", [0, 1, 2])
@pytest.mark.parametrize("mesh", [None, (1, 2, 4), (8, 1, 1), (1, 1, 8)], ids=str)
def test_texts_of_64_requests(drafts: int, mesh: tuple[int, int, int] | None):
    sizes = mesh and MeshConfig(data=mesh[0], node=mesh[1], local=mesh[2])
    model = random_model(LARGER)
    told = play(engine_of(model, drafts, sizes), random_requests(LARGER, 64, seed=drafts))
    assert check_texts(model, told) == 0
