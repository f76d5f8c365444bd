"""Text becomes the ids that the model reads, and ids become text."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

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
    """By a tokenizer that waits until somebody else was answered."""
    begun, answered, encode = threading.Event(), threading.Event(), TOKENIZER.encode
    waited = []

    def slow(text: str) -> np.ndarray:
        begun.set()
        waited.append(answered.wait(5))
        return encode(text)

    monkeypatch.setattr(TOKENIZER, "encode", slow)
    with serving(service_of(ScriptedEngine())) as base, ThreadPoolExecutor() as pool:
        long = pool.submit(ask, base, "/tokenize", {"prompt": "a" * 30_000})
        assert begun.wait(20)
        assert ask(base, "/health").status == 200
        answered.set()
        assert long.result().json()["count"] == 30_001
    assert waited == [True]


@pytest.mark.parametrize("body", [{}, {"prompt": 5}, {"prompt": "a", "more": 1}])
def test_other_requests_are_refused(base, body):
    assert ask(base, "/tokenize", body).error
    assert ask(base, "/detokenize", body).error
