"""Requests made from the server's own description, and such with faults put in: each is answered
as a client expects, whatever it is.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv3_jax.server.app import make_app
from dsv3_jax.server.openapi import description
from tests.server.clients import ask, events
from tests.server.described import values_of
from tests.server.scripted import ScriptedEngine, saying, service_of
from tests.server.serving import serving

PATHS = {
    "/v1/completions": "CompletionRequest",
    "/v1/chat/completions": "ChatRequest",
    "/tokenize": "TokenizeRequest",
    "/detokenize": "DetokenizeRequest",
}
LONG = pytest.mark.exhaustive
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def described(name: str) -> st.SearchStrategy[Any]:
    """Requests of this name."""
    schemas = description()["components"]["schemas"]
    return values_of(schemas[name], schemas)


@st.composite
def broken(draw: st.DrawFn, whole: st.SearchStrategy[Any]) -> Any:
    """A request with one field taken away, another in its place, or one more."""
    body = draw(whole)
    name = draw(st.sampled_from(sorted(body)) | st.text(max_size=10))
    if draw(st.booleans()):
        body.pop(name, None)
    else:
        body[name] = draw(ANYTHING)
    return body


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    with serving(service_of(ScriptedEngine(saying("fine"), seconds=0), queue=500)) as found:
        yield found


def check(base: str, path: str, body: Any) -> None:
    """Any answer but one of a server in trouble; errors in OpenAI's shape."""
    reply = ask(base, path, json.dumps(body).encode())
    if reply.status == 200 and body.get("stream"):
        assert list(events(reply.body))
    elif reply.status == 200:
        assert {"choices", "tokens", "prompt"} & set(reply.json())
    else:
        assert 400 <= reply.status < 500
        assert reply.error


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "examples",
    [
        pytest.param(60, marks=pytest.mark.slow),
        pytest.param(5000, marks=[LONG, pytest.mark.timeout(3600)]),
    ],
)
def test_whatever_the_description_allows_is_answered(base, path, examples):
    """Its own limits pass; what depends on the model may be refused."""
    whole = described(PATHS[path])

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(whole, broken(whole)))
    def answered(body: Any) -> None:
        check(base, path, body)

    answered()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "examples", [pytest.param(60, marks=pytest.mark.slow), pytest.param(5000, marks=LONG)]
)
def test_whatever_bytes_come_are_answered(base, path, examples):
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=300) | ANYTHING.map(lambda found: json.dumps(found).encode()))
    def answered(body: bytes) -> None:
        reply = ask(base, path, body)
        assert 400 <= reply.status < 500
        assert reply.error

    answered()


def test_the_description_says_what_is_taken():
    found = description()
    completion = found["components"]["schemas"]["CompletionRequest"]
    assert completion["additionalProperties"] is False
    assert completion["required"] == ["prompt"]


def test_every_path_is_described_but_the_page_and_the_description():
    gate = make_app(service_of(ScriptedEngine()))
    served = {path.replace(":path}", "}") for path in gate.paths}
    assert set(description()["paths"]) == served - {"/", "/openapi.json"}
