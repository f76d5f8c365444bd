"""Clients that people have work as they are: the openai package, curl."""

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator

import openai
import pytest

from dsv3_jax.server.keys import Keys
from tests.server.scripted import ScriptedEngine, saying, service_of
from tests.server.serving import serving

KEY, SAID = "secret-key", "0 1 2€3"
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    with serving(service_of(ScriptedEngine(saying(SAID)), keys=Keys([KEY]))) as found:
        yield found


@pytest.fixture
def client(base) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{base}/v1", api_key=KEY, max_retries=0) as found:
        yield found


def test_openais_client_chats(client):
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == "scripted"
    found = client.chat.completions.create(
        model=model.id, messages=HI, temperature=0.5, seed=3, logprobs=True, top_logprobs=1, n=2
    )
    assert [choice.message.content for choice in found.choices] == [SAID, SAID]
    assert found.choices[0].finish_reason == "stop"
    log = found.choices[0].logprobs.content[0]
    assert (log.token, log.top_logprobs[0].token) == ("0", "0")
    assert found.usage.total_tokens == found.usage.prompt_tokens + 2 * len(SAID.encode())


def test_openais_client_streams(client):
    options = {"include_usage": True}
    stream = client.chat.completions.create(
        model="scripted", messages=HI, stream=True, stream_options=options
    )
    pieces = list(stream)
    assert "".join(p.choices[0].delta.content for p in pieces if p.choices) == SAID
    assert pieces[-1].usage.completion_tokens == len(SAID.encode())
    stream = client.completions.create(model="scripted", prompt="a", max_tokens=99, stream=True)
    assert "".join(piece.choices[0].text for piece in stream) == SAID


def test_openais_client_completes(client):
    found = client.completions.create(
        model="scripted", prompt=["a", "b"], max_tokens=1, echo=True, logprobs=1, stop=["x"]
    )
    assert [choice.text for choice in found.choices] == ["a0", "b0"]
    assert found.choices[0].logprobs.token_logprobs[0] is None


def test_openais_client_knows_our_errors(base, client):
    with pytest.raises(openai.BadRequestError, match="temperature: Input should be less"):
        client.chat.completions.create(model="scripted", messages=HI, temperature=9)
    with pytest.raises(openai.NotFoundError, match="no such model; allowed: scripted"):
        client.chat.completions.create(model="other", messages=HI)
    with pytest.raises(openai.AuthenticationError, match="no key, or a wrong one"):
        client.with_options(api_key="wrong").models.list()


def test_openais_async_client_has_many_at_once(base):
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key=KEY) as client:

            async def one() -> str:
                stream = await client.chat.completions.create(
                    model="scripted", messages=HI, stream=True
                )
                return "".join([piece.choices[0].delta.content async for piece in stream])

            return await asyncio.gather(*(one() for _ in range(8)))

    assert asyncio.run(run()) == 8 * [SAID]


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl on this machine")
def test_curl_has_whole_answers_and_pieces(base):
    def curl(path: str, *more: str) -> str:
        command = ["curl", "--silent", "--no-buffer", "--max-time", "20", base + path, *more]
        command += ["-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    body = {"messages": HI}
    whole = json.loads(curl("/v1/chat/completions", "-d", json.dumps(body)))
    assert whole["choices"][0]["message"]["content"] == SAID
    stream = curl("/v1/chat/completions", "-d", json.dumps(body | {"stream": True}))
    assert stream.endswith("data: [DONE]\n\n")
    assert "dsv3_tokens_total" in curl("/metrics")
