"""Text becomes the ids that the model reads, and ids become text."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import numpy as np
import pytest

from dsv3_jax.data.chat import DEEPSEEK
from tests.server.clients import ask
from tests.server.scripted import END, LONGEST, TOKENIZER, ScriptedEngine, service_of
from tests.server.serving import serving


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    with serving(service_of(ScriptedEngine())) as found:
        yield found


def test_text_becomes_the_ids_that_a_completion_of_it_reads(base):
    found = ask(base, "/tokenize", {"prompt": "hé"}).json()
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode("hé").tolist()]
    assert found == {"count": 4, "max_model_len": LONGEST, "tokens": ids}
    plain = ask(base, "/tokenize", {"prompt": "hé", "add_special_tokens": False}).json()
    assert plain["tokens"] == ids[1:]
    assert ask(base, "/detokenize", {"tokens": ids}).json() == {"prompt": "hé"}


def test_a_mark_alone_is_itself_and_within_a_text_it_is_text(base):
    info = ask(base, "/tokenizer_info").json()
    assert info["chat_template"] == DEEPSEEK
    mark = info["eos_token"]
    alone = ask(base, "/tokenize", {"prompt": mark, "add_special_tokens": False}).json()
    assert alone["tokens"] == [END]
    within = ask(base, "/tokenize", {"prompt": f"a{mark}"}).json()
    assert END not in within["tokens"]


def test_another_models_tokens_are_not_told(base):
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})):
        assert ask(base, path, body | {"model": "scripted"}).status == 200
        assert ask(base, path, body | {"model": "other"}).error["code"] == "model_not_found"


def test_while_a_long_text_is_read_others_are_answered(monkeypatch):
    service = service_of(ScriptedEngine(lambda request: repeat(7)))
    reading, answered = threading.Event(), threading.Event()

    def encode(text: str) -> np.ndarray:
        reading.set()
        assert answered.wait(20), "nobody was answered"
        return np.zeros(0, np.int32)

    monkeypatch.setattr(service.jobs.tokenizer, "encode", encode)
    with serving(service) as base, ThreadPoolExecutor() as pool:
        for path, body in (
            ("/tokenize", {"prompt": "a" * 30_000}),
            ("/v1/completions", {"prompt": "a" * 100, "user": "b" * 30_000, "max_tokens": 1}),
        ):
            answered.clear()
            reading.clear()
            reply = pool.submit(ask, base, path, body)
            assert reading.wait(20)
            assert ask(base, "/health").status == 200
            answered.set()
            assert reply.result(20).status == 200


@pytest.mark.parametrize("body", [{}, {"prompt": 5}, {"prompt": "a", "more": 1}])
def test_other_requests_are_refused(base, body):
    assert ask(base, "/tokenize", body).error
    assert ask(base, "/detokenize", body).error
