"""What one engine has read another goes on with, as if it had read it itself."""

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import jax
import numpy as np
import pytest

from dsv3_jax.config.mesh import MeshConfig
from dsv3_jax.inference import engine as engines
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.handover import Handover
from dsv3_jax.inference.requests import Request
from dsv3_jax.inference.settings import EngineConfig
from dsv3_jax.inference.weights import lay_out
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.parallel.mesh import make_mesh
from tests.inference.engines import (
    DRAFTING,
    MODEL,
    Told,
    check_texts,
    count_compilations,
    drafting_model,
    expected_steps,
    prompts_of,
)
from tests.shapes import random_model
from tests.tolerances import FLOAT32, assert_close

ROOT = Path(__file__).parents[2]
# Pages of other sizes; and one size to compile of each program, for prompts of up to 16 tokens.
PREFILL = EngineConfig(rows=1, page_slots=4, chunk=16, drafts=2, share_prefixes=False)
DECODE = replace(PREFILL, page_slots=16)


@pytest.fixture(scope="module", autouse=True)
def _one_step_a_turn() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
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
    while engine.pending:
        for answer in engine.read_prompts() + engine.go_on():  # a turn puts them together
            steps[answer.id].append((answer.tokens, answer.logprobs))
    return list(steps.values())


def finish(engine: Engine, told: Mapping[int, Told]) -> None:
    """Goes on to the end of all texts; adds what is answered to what was told before."""
    for answer in engine.run():
        one = told[answer.id]
        one.tokens, one.logprobs = one.tokens + answer.tokens, one.logprobs + answer.logprobs
        one.ended = answer.ended


def handed(engine: Engine, request: Request) -> Handover:
    """The request as this engine has read it, having come as bytes."""
    request_id = engine.submit(request)
    while not engine.read_prompts():
        pass
    return Handover.from_bytes(engine.hand_over(request_id).to_bytes())


def test_a_text_goes_on_step_by_step_as_if_it_had_been_read_here(prefill, decode):
    """Drafts are as good from the first step on, drawn ones too. One row for all: they queue."""
    requests = prompts_of(DRAFTING, (1, 2, 3, 8, 16), most_new=20)
    requests[3] = replace(requests[3], temperature=0.7, seed=5)
    go_on_alike(prefill, decode, requests)


def go_on_alike(prefill: Engine, decode: Engine, requests: Sequence[Request]) -> None:
    """Step by step; and steps of 0, 1 and 2 drafts are among them."""
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


def test_steps_take_as_many_drafts_as_full_forward_passes_say(model, decode):
    """Or greedy texts would be the same, and come slowly."""
    requests, seen = prompts_of(DRAFTING, (1, 13), most_new=40), set()
    steps = steps_of(decode, [decode.submit(request) for request in requests])
    for request, (first, *others) in zip(requests, steps, strict=True):
        text = [*request.prompt, *first[0], *(token for tokens, _ in others for token in tokens)]
        expected = expected_steps(model, text, len(request.prompt))
        assert [len(tokens) for tokens, _ in others] == expected
        seen |= set(expected)
    assert seen == {1, 2, 3}


def test_a_text_handed_over_again_holds_what_it_would_have_held_here(prefill, decode):
    """Latents of every layer and module, and hidden states; log-probabilities of both engines."""
    (request,) = prompts_of(DRAFTING, (13,), most_new=40)
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
    def some(*lengths: int) -> None:
        for request in prompts_of(DRAFTING, lengths, most_new=3):
            decode.take_over(handed(prefill, request))
            list(decode.run())

    some(1, 16)
    with count_compilations() as compiled:
        some(5, 9, 12, 4)
    assert not compiled


def test_without_free_pages_texts_wait_in_the_order_of_their_coming(prefill, decode):
    requests = prompts_of(DRAFTING, (16, 1), most_new=3)
    pages = decode.scheduler.pages[0]
    lent = pages.lend(pages.count - 1)
    ids = [decode.take_over(handed(prefill, request)) for request in requests]
    assert decode.turn() == []  # the second one would find room
    assert decode.pending == 2
    pages.take_back(lent)
    assert sorted({answer.id for answer in decode.run()}) == ids


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
    longest = [1] * (DRAFTING.max_length - 1)
    request = replace(handover.request, prompt=longest)
    assert said(request=request, tokens=[*longest, 1]) == ended
    assert decode.pending == 0


# --- shared beginnings ---------------------------------------------------------------------------


def held_after(engine: Engine, request: Request, tokens: int) -> Handover:
    """What an engine holds of a request's text when it has so many tokens."""
    request_id = engine.submit(request)
    while len(engine._texts[request_id].tokens) < tokens:
        engine.turn()
    return engine.hand_over(request_id)


@pytest.mark.parametrize(("alike", "borrowed"), [(17, 0), (18, 16)])
def test_a_borrowed_page_holds_what_its_borrower_would_have_written(decode, alike, borrowed):
    """Pages of 16 tokens. The second MTP module's last latents there look at token 17."""
    request, other = prompts_of(DRAFTING, (22, 22), most_new=12)
    request = replace(request, temperature=0.9, seed=2)
    sharing = twin(decode, share_prefixes=True)
    prompt = [*request.prompt[:alike], *(63 - token for token in request.prompt[alike:])]
    sharing.submit(replace(other, prompt=prompt))
    list(sharing.run())
    alone, shared = (held_after(engine, request, 30) for engine in (decode, sharing))
    assert sharing.statistics.borrowed == borrowed
    assert shared.tokens == alone.tokens
    assert_close((shared.latents, shared.hidden_WD), (alone.latents, alone.hidden_WD), FLOAT32)


# --- two rows, prompts of several chunks ---------------------------------------------------------


@pytest.fixture(scope="module")
def two_rows(model) -> Engine:
    return Engine(lay_out(model, drafts=2), replace(DECODE, rows=2))


def twin(engine: Engine, **changes: object) -> Engine:
    """Another one that shares its programs: none of these changes needs others."""
    made = Engine(engine.weights, replace(engine.settings, **changes))
    made.programs = made.mover.programs = engine.programs
    return made


@pytest.fixture(scope="module")
def long_prefill(two_rows) -> Engine:
    return twin(two_rows)


@pytest.mark.exhaustive
def test_long_prompts_go_on_as_if_they_had_been_read_here(long_prefill, two_rows):
    go_on_alike(long_prefill, two_rows, prompts_of(DRAFTING, (1, 32, 17, 31), most_new=20))


@pytest.mark.exhaustive
def test_pages_that_are_known_are_borrowed_and_none_of_them_is_written(
    model, long_prefill, two_rows
):
    """Two texts that begin alike go on side by side, each as the model alone would have it."""
    sharing = twin(two_rows, share_prefixes=True)
    alike, *_ = prompts_of(DRAFTING, (20,), most_new=12)
    requests = [alike, replace(alike, prompt=[*alike.prompt[:18], 5, 6])]
    told = {}
    for request in requests:
        handover = handed(long_prefill, request)
        told[sharing.take_over(handover)] = Told(request, handover.tokens[-1:], handover.logprobs)
        assert sharing.read_prompts() == []  # it has its row now, and nobody goes on
    assert [text.borrowed for text in sharing.scheduler.running] == [0, 1]
    finish(sharing, told)
    assert check_texts(model, told) == 0


@pytest.mark.exhaustive
def test_a_text_that_gives_up_its_pages_reads_them_again(long_prefill, two_rows):
    """By itself, for what was handed over is no longer held."""
    requests = prompts_of(DRAFTING, (10, 11), most_new=12)
    alone = steps_of(two_rows, [two_rows.submit(request) for request in requests])
    pages = two_rows.scheduler.pages[0]
    before = two_rows.statistics.gave_up
    lent = pages.lend(pages.count - 3)
    steps = steps_of(two_rows, [two_rows.take_over(handed(long_prefill, one)) for one in requests])
    pages.take_back(lent)
    assert two_rows.statistics.gave_up > before
    for theirs, ours in zip(steps, alone, strict=True):
        assert [*chain(*(t for t, _ in theirs))] == [*chain(*(t for t, _ in ours[1:]))]


@pytest.mark.exhaustive
def test_an_fp8_cache_is_handed_over_as_it_is(model):
    settings = {"rows": 1, "drafts": 1, "fp8_cache": True}
    weights = lay_out(model, drafts=1)
    prefill, decode = (Engine(weights, replace(x, **settings)) for x in (PREFILL, DECODE))
    (request,) = prompts_of(DRAFTING, (15,), most_new=20)
    kinds = [x.dtype.name for x in handed(prefill, request).latents]
    assert kinds == 2 * ["float8_e4m3fn", "float32", "float32"]
    ((_, *ours),) = steps_of(decode, [decode.submit(request)])
    (theirs,) = steps_of(decode, [decode.take_over(handed(prefill, request))])
    assert [tokens for tokens, _ in theirs] == [tokens for tokens, _ in ours]


@pytest.mark.slow
def test_a_mesh_reads_and_another_goes_on():
    """Prompts on 2 x 2 devices, decoding on four others that are one node."""
    model = random_model(MODEL)
    weights = lay_out(model, drafts=1)
    devices, settings = jax.devices(), {"drafts": 1, "share_prefixes": True}
    meshes = MeshConfig(node=2, local=2), MeshConfig(local=4)
    prefill = Engine(weights, replace(PREFILL, **settings), make_mesh(meshes[0], devices[:4]))
    decode = Engine(weights, replace(DECODE, **settings), make_mesh(meshes[1], devices[4:]))
    told = {}
    for request in prompts_of(MODEL, (1, 9, 16, 12, 5, 7), most_new=20):
        prefill.submit(request)
    while prefill.pending:
        for answer in prefill.read_prompts():
            one = prefill.hand_over(answer.id)
            told[decode.take_over(one)] = Told(one.request, answer.tokens, answer.logprobs)
    assert len(told) == 6
    finish(decode, told)
    assert check_texts(model, told) == 0


# --- two processes -------------------------------------------------------------------------------

CHILD = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_disable_most_optimizations", True)
from tests.inference.test_two_engines import read_for
read_for(int(sys.argv[1]))
"""


def read_for(descriptor: int) -> None:
    """What the other process does: it reads prompts, and sends what it has read."""
    prefill = Engine(lay_out(drafting_model(), drafts=2), PREFILL)
    with Connection(descriptor) as pipe:
        while prompt := np.frombuffer(pipe.recv_bytes(), np.int32).tolist():
            request_id = prefill.submit(Request(prompt, 20))
            assert [answer.id for answer in prefill.read_prompts()] == [request_id]
            pipe.send_bytes(prefill.hand_over(request_id).to_bytes())


@pytest.mark.slow
def test_one_process_reads_and_another_goes_on(decode):
    requests = prompts_of(DRAFTING, (3, 16, 1), most_new=20)
    alone = steps_of(decode, [decode.submit(request) for request in requests])
    ours, theirs = Pipe()
    command = [sys.executable, "-c", CHILD, str(theirs.fileno())]
    with subprocess.Popen(command, cwd=ROOT, pass_fds=(theirs.fileno(),)) as child, ours:
        theirs.close()  # or its end would not be seen
        ids = []
        for request in requests:
            ours.send_bytes(np.array(request.prompt, np.int32))
            ids.append(decode.take_over(Handover.from_bytes(ours.recv_bytes())))
        ours.send_bytes(b"")
        steps = steps_of(decode, ids)
    assert child.returncode == 0
    for one, (_, *expected) in zip(steps, alone, strict=True):
        assert [tokens for tokens, _ in one] == [tokens for tokens, _ in expected]
