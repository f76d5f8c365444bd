"""Texts of an engine are those of the model alone, whoever else is served."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config.mesh import MeshConfig
from dsv3_jax.inference import engine as engine_module
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
from tests.shapes import compiled, random_model

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
    return engine_of(model, 2, top_logprobs=3, prompt_logprobs=True)


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


def test_a_prompts_tokens_are_told_of_as_the_model_has_them(model, with_drafts):
    """Of long ones in chunks, of one that was read already, of some that gave up their pages; and
    only of those that wish it.
    """
    long = list(range(40))
    asked = [
        *(Request(one.prompt, 20) for one in random_requests(MODEL, 8, seed=11)),
        *(replace(one, prompt_logprobs=True) for one in random_requests(MODEL, 12, seed=12)),
        *(Request(long, 5, prompt_logprobs=True) for _ in range(2)),
        Request([3], 2, prompt_logprobs=True),
    ]
    gave_up = with_drafts.statistics.gave_up
    ids = {with_drafts.submit(request): request for request in asked}
    told = {answer.id: answer.prompt for answer in with_drafts.run() if answer.prompt}
    assert set(told) == {number for number, one in ids.items() if one.prompt_logprobs}
    assert with_drafts.statistics.gave_up > gave_up
    forward = compiled(model)
    for number, scores in told.items():
        prompt = np.array(ids[number].prompt)
        row_1T = np.zeros((1, MODEL.max_length), np.int32)
        row_1T[0, : len(prompt)] = prompt
        logits_TV = forward(row_1T)[0, : len(prompt) - 1].astype(jnp.float32)
        logprob_TV = np.asarray(jax.nn.log_softmax(logits_TV, axis=-1))
        expected = logprob_TV[np.arange(len(prompt) - 1), prompt[1:]]
        np.testing.assert_allclose(scores.logprobs, expected, atol=1e-4)
        top = np.array(scores.top).reshape(len(prompt) - 1, 3, 2)
        np.testing.assert_allclose(top[..., 1], -np.sort(-logprob_TV, -1)[:, :3], atol=1e-4)
        found = np.take_along_axis(logprob_TV, top[..., 0].astype(int), -1)
        np.testing.assert_allclose(top[..., 1], found, atol=1e-4)


def test_prompts_are_not_told_of_unless_the_engine_is_set_to(with_drafts):
    apart = Engine(with_drafts.weights, replace(with_drafts.settings, prompt_logprobs=False))
    with pytest.raises(ValueError, match="allowed where the engine's prompt_logprobs is set"):
        apart.submit(Request([1, 2], 3, prompt_logprobs=True))


def test_loads_are_collected_before_devices_count_too_far(model, with_drafts, monkeypatch):
    before = with_drafts.total_loads()
    with_drafts.take_loads()
    monkeypatch.setattr(engine_module, "MOST_COUNTED", 8)
    texts_of(with_drafts, [Request([1, 2, 3, 4, i], 6) for i in range(4)])
    on_devices = np.asarray(with_drafts.state.load_LE).sum()
    taken, total = with_drafts.take_loads(), with_drafts.total_loads()
    np.testing.assert_array_equal(total - before, taken)
    assert 0 < on_devices < taken.sum()
    assert not with_drafts.take_loads().any()


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


def texts_of(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """The answers' tokens, of all requests at once."""
    texts = {engine.submit(request): [] for request in requests}
    for answer in engine.run():
        texts[answer.id] += answer.tokens
    return list(texts.values())


def test_whole_numbers_of_any_kind_are_served_and_the_callers_list_stays_the_callers(with_drafts):
    prompt = [1, 2, 3, 4]
    kinds = [tuple(prompt), np.array(prompt), jnp.array(prompt), iter(prompt)]
    (expected,) = texts_of(with_drafts, [Request(prompt, 10)])
    assert texts_of(with_drafts, [Request(one, 10) for one in kinds]) == 4 * [expected]
    request_id = with_drafts.submit(Request(prompt, 10))
    found = []
    for answer in with_drafts.run():  # a conversation that goes on in one list
        assert answer.id == request_id
        found += answer.tokens
        prompt += answer.tokens
    assert found == expected


def test_whoever_is_cancelled_between_two_answers_has_none_any_more(with_drafts):
    """Also when the turn that found the first of them has found the second one's too."""
    ids = {with_drafts.submit(Request([5, i], 20)) for i in range(4)}
    first = next(answers := with_drafts.run()).id
    for other in ids:
        assert with_drafts.cancel(other)
        assert not with_drafts.cancel(other)
    assert list(answers) == []
    assert first in ids


def test_what_is_drawn_does_not_depend_on_whom_a_beginning_is_borrowed_from(with_drafts):
    """Drafts neither: an MTP module's latent of a page's end depends on the tokens behind it."""
    apart = Engine(with_drafts.weights, replace(with_drafts.settings, share_prefixes=False))
    apart.programs = apart.mover.programs = with_drafts.programs
    rng = np.random.default_rng(7)
    alike = rng.integers(0, 64, 16).tolist()
    requests = [Request([*alike, 2 * i, i], 6, temperature=1.0, seed=i) for i in range(24)]
    borrowed = with_drafts.statistics.borrowed
    assert texts_of(with_drafts, requests) == texts_of(apart, requests)
    assert with_drafts.statistics.borrowed > borrowed + 100


def test_nan_in_one_text_changes_no_other(with_drafts):
    """Nor does it in tokens that fill a chunk up, of id 0, or in a row that another had before."""
    rng, weights = np.random.default_rng(3), with_drafts.weights
    clean = [
        Request(rng.integers(1, 64, n).tolist(), 12, temperature=n % 2, end_ids=frozenset([0]))
        for n in (1, 2, 3, 5, 9, 17, 18, 1)
    ]
    broken = [replace(one, prompt=[0, *one.prompt]) for one in clean]
    expected = texts_of(with_drafts, clean)
    rest = jax.tree.map(lambda x: x, weights.rest)
    rest.embed_VD = rest.embed_VD.replace(rest.embed_VD[...].at[0].set(jnp.nan))
    with_drafts.weights = weights._replace(rest=rest)
    alone = texts_of(with_drafts, clean)
    mixed = texts_of(with_drafts, [one for pair in zip(broken, clean, strict=True) for one in pair])
    with_drafts.weights = weights
    # A text may draft the broken token itself: not all of it need be as before.
    assert [text[0] for text in alone] == [text[0] for text in expected]
    assert mixed[::2] == 8 * [[0]]  # what the likeliest of NaN is
    assert mixed[1::2] == alone


def test_whatever_is_warmed_up_can_occur(model, monkeypatch):
    """Chunks are longer here than all that the cache has room for."""
    engine, sizes = engine_of(model, 0, pages=3, chunk=256), []
    monkeypatch.setattr(engine, "_run_read", lambda *args: sizes.append(args[2:]))
    monkeypatch.setattr(engine, "_run_go_on", lambda grid, width, steps: None)
    monkeypatch.setattr(engine.mover, "warm_up", lambda weights, state: state)
    engine.warm_up()
    assert sizes == [(12, 3, True), (12, 3, False)]


def test_settings_that_the_model_does_not_allow_are_refused(model):
    with pytest.raises(ValueError, match=r"engine.drafts is 3; allowed: 0 to 2"):
        Engine(lay_out(model), EngineConfig(drafts=3))
    with pytest.raises(ValueError, match=r"engine.drafts is 2; allowed: 1, the MTP"):
        Engine(lay_out(model, drafts=1), EngineConfig(drafts=2))
    with pytest.raises(ValueError, match=r"engine.top_logprobs is 20; allowed: 0 to 3"):
        EngineConfig(top_logprobs=20).check_model(replace(MODEL, vocab_size=3))


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
def test_prompts_on_eight_devices_are_told_of_as_on_one(model):
    """Beside texts that do not wish it, in two micro-batches; some give up their pages."""
    asked = random_requests(MODEL, 32, seed=13)
    asked = [replace(one, prompt_logprobs=i % 2 == 0) for i, one in enumerate(asked)]
    eight = MeshConfig(data=2, node=2, local=2)
    wishes = {"top_logprobs": 2, "prompt_logprobs": True, "pages": 20}
    found = []
    for engine in (
        engine_of(model, 1, **wishes),
        engine_of(model, 1, eight, rows=2, prompt_microbatches=2, **wishes),
    ):
        ids = [engine.submit(one) for one in asked]
        told = {answer.id: answer.prompt for answer in engine.run() if answer.prompt}
        found.append([told.get(number) for number in ids])
    for request, one, other in zip(asked, *found, strict=True):
        assert (one is not None) == (other is not None) == request.prompt_logprobs
        if one is not None:
            assert len(one.logprobs) == len(request.prompt) - 1
            np.testing.assert_allclose(other.logprobs, one.logprobs, atol=1e-4)
            top, top_of_one = (np.array(x.top).reshape(-1, 2, 2)[..., 1] for x in (other, one))
            np.testing.assert_allclose(top, top_of_one, atol=1e-4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("drafts", [0, 1, 2])
@pytest.mark.parametrize("mesh", [None, (1, 2, 4), (8, 1, 1), (1, 1, 8)], ids=str)
def test_texts_of_64_requests(drafts: int, mesh: tuple[int, int, int] | None):
    sizes = mesh and MeshConfig(data=mesh[0], node=mesh[1], local=mesh[2])
    model = random_model(LARGER)
    told = play(engine_of(model, drafts, sizes), random_requests(LARGER, 64, seed=drafts))
    assert check_texts(model, told) == 0
