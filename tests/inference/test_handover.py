"""What one engine has read another goes on with, as if it had read it itself."""

import pickle
import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.inference import engine as engines
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.handover import Handover
from dsv3_jax.inference.requests import Request
from dsv3_jax.inference.settings import EngineConfig
from dsv3_jax.inference.weights import lay_out
from dsv3_jax.model.transformer import DeepSeekV3
from tests.inference.engines import (
    DRAFTING,
    Told,
    check_texts,
    drafting_model,
    prompts_of,
)
from tests.runs import jax_option
from tests.tolerances import FLOAT32, assert_close

# Pages of other sizes, and few sizes to compile: prompts of at most 32 tokens are 4 pages.
PREFILL = EngineConfig(rows=2, page_slots=8, chunk=16, drafts=2)
DECODE = replace(PREFILL, page_slots=16, share_prefixes=False)
# An array of each dtype that there is, and their widths.
ARRAYS = ((np.float32, 4), (ml_dtypes.bfloat16, 3), (ml_dtypes.float8_e4m3fn, 5), (np.float64, 1))


# --- bytes ---------------------------------------------------------------------------------------


def made_up(slots: int = 3) -> Handover:
    """Every bit pattern is welcome, NaN too: bytes are compared."""
    rng = np.random.default_rng(slots)
    arrays = [
        np.frombuffer(rng.bytes(slots * width * np.dtype(kind).itemsize), kind).reshape(slots, -1)
        for kind, width in ARRAYS
    ]
    request = Request(np.arange(slots), 9, 0.7, 0.9, seed=2**32 - 1, end_ids=frozenset([3, 1]))
    tokens = [*range(slots), 63]
    form = {"model.yarn": {"factor": 1e-7}, "model.q_latent": None, "engine.drafts": 2}
    return Handover(request, tokens, [-1 / 3], form, tuple(arrays), arrays[0][:0])


def test_bytes_carry_every_bit():
    sent = made_up()
    come = Handover.from_bytes(sent.to_bytes())
    for one, other in zip(
        (*come.latents, come.hidden_WD), (*sent.latents, sent.hidden_WD), strict=True
    ):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    assert come.request == replace(sent.request, prompt=[0, 1, 2])
    assert (come.tokens, come.logprobs, come.form) == (sent.tokens, sent.logprobs, sent.form)
    assert come.to_bytes() == sent.to_bytes()


def refused(data: bytes) -> str:
    with pytest.raises(ValueError, match="hand-over") as caught:
        Handover.from_bytes(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bytes_that_are_cut_off_or_run_on_are_refused():
    data = made_up().to_bytes()
    for length in range(len(data)):
        refused(data[:length])
    said = f"a hand-over of {len(data)} bytes, of which {len(data) - 1} are here"
    assert refused(data[:-1]) == said
    refused(data + b"\0")


def test_bytes_of_something_else_are_refused():
    for data in (b"", b"\0" * 100, pickle.dumps([1]), b"{}", made_up().to_bytes()[1:]):
        assert refused(data) == f"{len(data)} bytes that are no hand-over: they begin otherwise"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"tokens"', b'"tokend"'),
        (b'"tokens": [0,', b'"tokens": {0,'),
        (b'"tokens": [0,', b'"tokens": [.,'),
        (b'"max_tokens"', b'"man_tokens"'),
        (b'"max_tokens": 9', b'"max_tokens":""'),
        (b'"prompt": [0, 1, 2]', b'"prompt": [0,1,2.0]'),
        (b'"float32"', b'"float23"'),
        (b'"float32"', b'"objects"'),
        (b'["float32", 3, 4]', b'["float32", 3, 5]'),
        (b'["float32", 3, 4]', b'["float32", 9, 4]'),
        (b'["float32", 3, 4]', b'["float32",-3,-4]'),
        (b'["float32", 3, 4]', b'["float32", true]'),
        (b'{"request"', b'["request"'),
        (b'{"request"', b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
    ],
)
def test_headers_that_say_something_else_are_refused(old: bytes, new: bytes):
    data = made_up().to_bytes()
    assert data.count(old) >= 1
    assert len(old) == len(new)
    assert refused(data.replace(old, new, 1)) == "a hand-over whose header cannot be read"


def test_a_header_longer_than_the_bytes_is_refused():
    data = bytearray(made_up().to_bytes())
    struct.pack_into("<Q", data, data.index(b"\n") + 9, 2**60)
    assert refused(bytes(data)) == "a hand-over whose header cannot be read"


# --- engines -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Little is optimised, and every turn makes one step."""
    with jax_option("jax_disable_most_optimizations"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "PATIENCE", 0.0)
        yield


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    return drafting_model()


@pytest.fixture(scope="module")
def prefill(model) -> Engine:
    return Engine(lay_out(model, drafts=2), PREFILL)


@pytest.fixture(scope="module")
def decode(model) -> Engine:
    return Engine(lay_out(model, drafts=2), DECODE)


def steps_of(engine: Engine, ids: Sequence[int]) -> list[list[tuple[list[int], list[float]]]]:
    """Tokens and their log-probabilities, answer by answer: of one step each."""
    steps = {i: [] for i in ids}
    for answer in engine.run():
        steps[answer.id].append((answer.tokens, answer.logprobs))
    return list(steps.values())


def handed(engine: Engine, request: Request) -> Handover:
    """The request as this engine has read it, having come as bytes."""
    request_id = engine.submit(request)
    while not engine.read_prompts():
        pass
    return Handover.from_bytes(engine.hand_over(request_id).to_bytes())


def test_a_text_goes_on_step_by_step_as_if_it_had_been_read_here(prefill, decode):
    """Drafts are as good from the first step on. Five texts have two rows: they queue."""
    requests = prompts_of(DRAFTING, (1, 2, 8, 17, 32), most_new=20)
    alone = steps_of(decode, [decode.submit(request) for request in requests])
    handovers = [handed(prefill, request) for request in requests]
    steps = steps_of(decode, [decode.take_over(one) for one in handovers])
    for one, theirs, (first, *ours) in zip(handovers, steps, alone, strict=True):
        assert one.tokens[-1:] == first[0]
        assert np.allclose(one.logprobs, first[1], atol=1e-5)
        assert [tokens for tokens, _ in theirs] == [tokens for tokens, _ in ours]
        for (_, logprobs), (_, expected) in zip(theirs, ours, strict=True):
            assert np.allclose(logprobs, expected, atol=1e-5)
    assert {len(tokens) for one in steps for tokens, _ in one} == {1, 2, 3}
    for engine in (prefill, decode):
        assert not engine.pending
        assert all(pages.free == pages.count for pages in engine.scheduler.pages)


def test_a_text_handed_over_again_holds_what_it_would_have_held_here(prefill, decode):
    """Latents of every layer and module, and hidden states; log-probabilities of both engines."""
    (request,) = prompts_of(DRAFTING, (21,), most_new=30)
    held = []
    for submit in (
        lambda: decode.submit(request),
        lambda: decode.take_over(handed(prefill, request)),
    ):
        request_id = submit()
        while len(decode._texts[request_id].tokens) < 40:
            decode.turn()
        held.append(decode.hand_over(request_id))
    one, other = held
    assert one.tokens == other.tokens
    assert_close(np.array(other.logprobs), np.array(one.logprobs), FLOAT32)
    assert_close((other.latents, other.hidden_WD), (one.latents, one.hidden_WD), FLOAT32)
    assert len(one.latents) == 2 * 3
    assert len(one.hidden_WD) == 4


def test_lengths_share_what_is_compiled(prefill, decode):
    for request in prompts_of(DRAFTING, (1, 30), most_new=3):
        decode.take_over(handed(prefill, request))
        list(decode.run())
    before = prefill.programs.compiled, decode.programs.compiled
    for request in prompts_of(DRAFTING, (5, 9, 16, 25), most_new=3):
        decode.take_over(handed(prefill, request))
        list(decode.run())
    assert (prefill.programs.compiled, decode.programs.compiled) == before


def test_pages_that_are_known_are_borrowed_and_none_of_them_is_written(model, prefill, decode):
    """One of two texts that begin alike; the other one's text stays as it was."""
    sharing = Engine(lay_out(model, drafts=2), replace(DECODE, share_prefixes=True))
    sharing.programs = decode.programs
    alike, *_ = prompts_of(DRAFTING, (20,), most_new=12)
    requests = [alike, replace(alike, prompt=[*alike.prompt[:17], 5, 6])]
    told = {}
    for request in requests:
        handover = handed(prefill, request)
        told[sharing.take_over(handover)] = Told(request, handover.tokens[-1:], handover.logprobs)
        assert sharing.read_prompts() == []  # it has its row now, and nobody goes on
    assert [text.borrowed for text in sharing.scheduler.running] == [0, 1]
    for answer in sharing.run():
        one = told[answer.id]
        one.tokens, one.logprobs = one.tokens + answer.tokens, one.logprobs + answer.logprobs
        one.ended = answer.ended
    assert check_texts(model, told) == 0


def test_without_free_pages_texts_wait_in_the_order_of_their_coming(prefill, decode):
    requests = prompts_of(DRAFTING, (20, 1), most_new=2)
    pages = decode.scheduler.pages[0]
    lent = pages.lend(pages.count - 1)
    ids = [decode.take_over(handed(prefill, request)) for request in requests]
    assert decode.turn() == []  # the second one would find room
    assert decode.pending == 2
    pages.take_back(lent)
    assert sorted({answer.id for answer in decode.run()}) == ids


def test_a_text_that_gives_up_its_pages_reads_them_again(prefill, decode):
    """By itself, for what was handed over is no longer held."""
    requests = prompts_of(DRAFTING, (15, 15), most_new=12)
    alone = steps_of(decode, [decode.submit(request) for request in requests])
    pages = decode.scheduler.pages[0]
    lent = pages.lend(pages.count - 3)
    steps = steps_of(decode, [decode.take_over(handed(prefill, one)) for one in requests])
    pages.take_back(lent)
    for theirs, ours in zip(steps, alone, strict=True):
        assert [*chain(*(t for t, _ in theirs))] == [*chain(*(t for t, _ in ours[1:]))]


def test_what_is_cancelled_in_between_leaves_nothing(prefill, decode):
    requests = prompts_of(DRAFTING, (9, 9, 9), most_new=9)
    first, second, third = (decode.take_over(handed(prefill, one)) for one in requests)
    assert decode.cancel(first)  # before it has a row
    decode.turn()
    assert decode.cancel(second)  # in the middle
    assert {answer.id for answer in decode.run()} == {third}
    here = prefill.submit(requests[0])
    assert prefill.read_prompts()
    assert prefill.cancel(here)  # read, and not handed over
    for engine in (prefill, decode):
        assert all(pages.free == pages.count for pages in engine.scheduler.pages)


def test_a_hand_over_is_given_once_and_can_be_taken_twice(prefill, decode):
    (request,) = prompts_of(DRAFTING, (9,), most_new=9)
    request_id = prefill.submit(request)
    said = f"request {request_id} has 9 tokens to be read; allowed: one with a first token"
    with pytest.raises(ValueError, match=said):
        prefill.hand_over(request_id)
    assert [answer.id for answer in prefill.read_prompts()] == [request_id]
    assert prefill.read_prompts() == []  # it stays where it is
    handover = prefill.hand_over(request_id)
    with pytest.raises(ValueError, match=f"request {request_id} is not here; allowed: one with"):
        prefill.hand_over(request_id)
    ids = [decode.take_over(handover) for _ in range(2)]
    one, other = steps_of(decode, ids)
    assert one == other
    assert sum(len(tokens) for tokens, _ in one) == 8
    assert len(handover.tokens) == 10


def test_what_is_of_another_model_or_another_cache_is_refused(prefill, decode):
    handover = handed(prefill, prompts_of(DRAFTING, (9,), most_new=9)[0])

    def said(**changes: object) -> str:
        with pytest.raises(ValueError, match="a hand-over") as caught:
            decode.take_over(replace(handover, **changes))
        return str(caught.value)

    for name, value in {
        "model.num_layers": 2,
        "model.kv_latent": 12,
        "model.rope_theta": 1.5,
        "engine.drafts": 1,
        "engine.fp8_cache": True,
        "dtype": "bfloat16",
        "weights": 7,
    }.items():
        ours = decode.form[name]
        expected = f"a hand-over with {name} {value}; allowed here: {ours}"
        assert said(form=decode.form | {name: value}) == expected
    assert said(form=decode.form | {"more": 1}) == "a hand-over with more 1; allowed here: None"
    arrays = "a hand-over whose arrays are not those of 9 tokens here"
    assert said(latents=handover.latents[:-1]) == arrays
    assert said(latents=tuple(x[:-1] for x in handover.latents)) == arrays
    assert said(latents=tuple(x.astype(np.float64) for x in handover.latents)) == arrays
    assert said(hidden_WD=np.zeros((5, 32), np.float32)) == arrays
    tokens = "a hand-over whose tokens are not its prompt and an answer's beginning"
    assert said(tokens=[99, *handover.tokens[1:]]) == tokens
    assert said(tokens=[*handover.tokens[:-1], 64]) == tokens
    assert said(tokens=handover.tokens[:-1]) == tokens
    assert said(logprobs=[]) == tokens
    ended = "a hand-over of a text that has ended"
    assert said(request=replace(handover.request, max_tokens=1)) == ended
    assert said(request=replace(handover.request, end_ids=frozenset(handover.tokens[-1:]))) == ended
    assert decode.pending == 0
