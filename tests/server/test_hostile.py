"""Requests that are wrong, by mistake or by intent: each has its 4xx in OpenAI's shape, or its
connection closed in the time that is stated, and the server goes on.
"""

import json
import socket
import threading
import time
from collections.abc import Iterator
from itertools import repeat

import pytest

from dsv3_jax.server import http
from tests.server.clients import JSON, ask, open_socket, raw_request, read_all, until
from tests.server.scripted import LONGEST, ScriptedEngine, saying, service_of
from tests.server.serving import serving

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
PATIENCE = 1.0  # seconds that connections have in these tests, for 30


@pytest.fixture(autouse=True)
def _quiet(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("receive_seconds", "stall_seconds"):
            patch.setattr(http.GuardedProtocol, name, PATIENCE)
        patch.setattr(http, "IDLE_SECONDS", 1)
        with serving(service_of(ScriptedEngine(saying("fine")))) as found:
            yield found
            assert ask(found, COMPLETIONS, {"prompt": "a"}).json()["choices"][0]["text"] == "fine"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "Invalid JSON"),
        (b"{", "Invalid JSON"),
        (b"\xff\xfe", "Invalid JSON"),
        (b'{"prompt": "\xff"}', "Invalid JSON: invalid unicode"),
        (b'{"prompt": "\\ud800"}', "Invalid JSON"),
        (b"[" * 90_000, "recursion limit exceeded"),
        (b'{"prompt": "a", "max_tokens": ' + b"9" * 9_000 + b"}", "number out of range"),
        ([], "Input should be an object"),
        (None, "Input should be an object"),
        ({}, "prompt: allowed: text, a list of texts"),
        ({"prompt": []}, "prompt: allowed: text"),
        ({"prompt": [[]]}, "prompt: allowed: text"),
        ({"prompt": [1, "a"]}, "prompt: allowed: text"),
        ({"prompt": ["a"] * 129}, "prompt: allowed: text"),
        ({"prompt": {"a": 1}}, "prompt: allowed: text"),
        ({"prompt": [-1]}, "prompt: allowed: text"),
        ({"prompt": [300]}, "token id 300; allowed: 0 to 261"),
        (
            {"prompt": "a" * LONGEST},
            f"the prompt has {LONGEST} characters; allowed: at most",
        ),
        ({"prompt": "a" * (LONGEST - 1)}, f"the prompt has {LONGEST} tokens; allowed: at most"),
        ({"prompt": [5] * LONGEST}, f"the prompt has {LONGEST} tokens; allowed: at most"),
        ({"prompt": "a", "unknown": 1}, "unknown: unknown or unserved field"),
        ({"prompt": "a", "__class__": 1}, "__class__: unknown or unserved field"),
        ({"prompt": "a", "max_tokens": "5"}, "max_tokens: Input should be a valid integer"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens: Input should be a valid integer"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens: Input should be a valid integer"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens: Input should be greater than or equal"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens is 0; allowed with echo alone"),
        ({"prompt": "a", "max_tokens": 10**30}, "max_tokens: Input should be less than"),
        ({"prompt": "a", "temperature": -0.1}, "temperature: Input should be greater"),
        ({"prompt": "a", "temperature": 1e308}, "temperature: Input should be less"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature: Input should be a finite number"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature: Input should be a finite number"),
        ({"prompt": "a", "top_p": 0}, "top_p: Input should be greater than"),
        ({"prompt": "a", "n": 0}, "n: Input should be greater"),
        ({"prompt": "a", "n": 100}, "100 texts at once; allowed: 12"),
        ({"prompt": "a", "best_of": 2}, "best_of differs from n"),
        ({"prompt": "a", "logprobs": 21}, "logprobs: Input should be less"),
        ({"prompt": "a", "stop": ""}, "stop: allowed: text"),
        ({"prompt": "a", "stop": ["a"] * 17}, "stop: allowed: text"),
        ({"prompt": "a", "seed": 2**63}, "seed: Input should be less"),
        ({"prompt": "a", "presence_penalty": 1}, "presence_penalty: allowed here: 0, not 1"),
        ({"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias: Dictionary should have at most 0"),
        ({"prompt": "a", "stream_options": {}}, "stream_options; allowed with stream true"),
        ({"prompt": "a", "suffix": "b"}, "suffix: String should have at most 0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_completion_is_refused_in_a_line(base, body, said):
    body = b"null" if body is None else body
    reply = ask(base, COMPLETIONS, body, headers=JSON)
    assert reply.status == 400
    assert said in reply.error["message"]
    assert reply.error["type"] == "invalid_request_error"
    assert len(reply.body) < 2000


HI = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"messages": []}, "messages: List should have at least 1"),
        ({"messages": "hi"}, "messages: Input should be a valid array"),
        ({"messages": [{"role": "root", "content": "a"}]}, "messages.0.role: Input should be"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: allowed: text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content: allowed: text, or a list of parts of type text",
        ),
        ({"messages": [HI | {"tool_calls": [{}]}]}, "messages.0.tool_calls: List should have"),
        ({"messages": [HI], "tools": [{"type": "function"}]}, "tools: List should have at most 0"),
        ({"messages": [HI], "top_logprobs": 2}, "top_logprobs; allowed with logprobs true"),
        ({"messages": [HI], "max_tokens": 0}, "max_tokens is 0; allowed: 1 or more"),
        (
            {"messages": [HI], "response_format": {"type": "json_object"}},
            "response_format.type: Input should be 'text'",
        ),
        (
            {"messages": [HI | {"content": "a" * LONGEST}]},
            "characters; allowed: at most 255",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_wrong_chat_is_refused_in_a_line(base, body, said):
    reply = ask(base, CHATS, body)
    assert reply.status == 400
    assert said in reply.error["message"]


def test_another_model_is_not_there(base):
    for reply in (
        ask(base, COMPLETIONS, {"prompt": "a", "model": "gpt"}),
        ask(base, "/v1/models/gpt"),
    ):
        assert reply.status == 404
        assert reply.error["code"] == "model_not_found"
    assert ask(base, "/v1/models/scripted").json()["id"] == "scripted"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "/v1/models/../../../etc/passwd", 404),
        ("GET", "//etc/passwd", 404),
        ("GET", "/chat.html", 404),
        ("GET", "/%00", 404),
        ("GET", "/" + "a" * 8000, 404),
        ("BREW", "/", 405),
    ],
)
def test_no_other_path_or_method_is_served(base, method, path, status):
    reply = ask(base, path, method=method)
    assert reply.status == status
    assert reply.error


def test_bodies_have_a_type_and_a_size(base):
    kinds = ("text/plain", "application/x-www-form-urlencoded", "")
    for kind in kinds:
        reply = ask(base, COMPLETIONS, b'{"prompt": "a"}', headers={"content-type": kind})
        assert (reply.status, "application/json" in reply.error["message"]) == (415, True)
    assert ask(base, COMPLETIONS, b'"' + b"a" * 10_000_000 + b'"').status == 413
    chunked = JSON | {"transfer-encoding": "chunked"}
    big = b"".join(b"%x\r\n%s\r\n" % (9000, b"a" * 9000) for _ in range(50)) + b"0\r\n\r\n"
    assert ask(base, COMPLETIONS, big, headers=chunked).status == 413


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00" * 100_000,
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # without a host
        b"GET / HTTP/1.1\r\nhost: localhost\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nlong: " + b"a" * 200_000 + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=lambda sent: str(sent[:30]),
)
def test_what_is_no_http_is_refused_and_closed(base, sent):
    with open_socket(base) as client:
        try:
            client.sendall(sent)
        except ConnectionError:
            return
        answer = read_all(client)
    assert answer == b"" or answer.split(b" ")[1].startswith(b"4")


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/comp",
        raw_request(COMPLETIONS, b'{"prompt": "a"}')[:-3],
        2 * raw_request("/nowhere", b"") + raw_request(COMPLETIONS, b'{"prompt": "a"}')[:-3],
        2 * raw_request("/nowhere", b"") + b"POST /v1/comp",
        raw_request(COMPLETIONS, b"", "transfer-encoding: chunked").replace(
            b"content-length: 0\r\n", b""
        ),
    ],
    ids=[
        "nothing",
        "half a line",
        "half a body",
        "half a body behind others",
        "half a line behind others",
        "no chunk",
    ],
)
def test_a_slow_request_is_closed_in_time(base, sent):
    with open_socket(base) as client:
        began = time.monotonic()
        client.sendall(sent)
        assert b" 200 " not in read_all(client)
        assert PATIENCE * 0.8 < time.monotonic() - began < PATIENCE * 8


def test_drops_of_a_request_do_not_buy_time(base):
    with open_socket(base) as client:
        began = time.monotonic()
        for _ in range(200):
            try:
                client.sendall(b"a")
            except ConnectionError:
                break
            time.sleep(0.05)
        assert time.monotonic() - began < PATIENCE * 8


@pytest.mark.slow
def test_who_takes_no_answer_is_left(monkeypatch):
    """Its text is cancelled. Its pieces are long, and fill what the system keeps for it."""
    monkeypatch.setattr(http.GuardedProtocol, "stall_seconds", PATIENCE)
    engine = ScriptedEngine(lambda request: repeat(7), seconds=0)
    engine.check = lambda request: 10**9
    service = service_of(engine, seconds=100)
    with serving(service) as base, open_socket(base) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = {"prompt": "a", "max_tokens": 200, "stream": True, "n": 4, "logprobs": 20}
        client.sendall(raw_request(COMPLETIONS, json.dumps(body).encode()))
        until(lambda: engine.turns > 10)
        until(lambda: len(engine.cancelled) == 4, 60)
        assert service.thread.open == 0


def test_half_a_body_and_gone_is_no_fault_of_the_server(base):
    for path in (COMPLETIONS, "/tokenize"):
        with open_socket(base) as client:
            client.sendall(raw_request(path, b'{"prompt": "a"}')[:-3])
    assert ask(base, "/health").status == 200


def test_pipelined_requests_are_answered_in_order(base):
    one = raw_request(COMPLETIONS, b'{"prompt": "a", "max_tokens": 1}')
    with open_socket(base) as client:
        client.sendall(one + one + raw_request(COMPLETIONS, b"{", "connection: close"))
        answer = read_all(client)
    statuses = [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200", b"200", b"400"]


def test_beyond_so_many_connections_there_is_503():
    with serving(service_of(ScriptedEngine()), connections=3) as base:
        idle = [open_socket(base) for _ in range(2)]
        until(lambda: ask(base, "/health").status == 200)
        idle += [open_socket(base)]
        until(lambda: ask(base, "/health").status == 503)
        for client in idle:
            client.close()
        until(lambda: ask(base, "/health").status == 200)


def test_a_full_queue_says_when_to_come_again():
    engine = ScriptedEngine(rows=1, seconds=0.01)
    with serving(service_of(engine, queue=1)) as base:
        body = {"prompt": "a", "max_tokens": 100, "stream": True}
        clients = [open_socket(base) for _ in range(2)]
        for client in clients:
            client.sendall(raw_request(COMPLETIONS, json.dumps(body).encode()))
        until(lambda: engine.pending == 2)
        reply = ask(base, COMPLETIONS, {"prompt": "a", "max_tokens": 1})
        assert (reply.status, reply.error["code"]) == (429, "queue_full")
        assert 1 <= int(reply.headers["retry-after"]) <= 60
        for client in clients:
            client.close()
        until(lambda: engine.pending == 0)
        assert ask(base, COMPLETIONS, {"prompt": "a", "max_tokens": 1}).status == 200


def test_a_request_has_its_time():
    with serving(service_of(ScriptedEngine(seconds=0.05), seconds=0.3)) as base:
        reply = ask(base, COMPLETIONS, {"prompt": "a", "max_tokens": 200})
        assert (reply.status, reply.error["code"]) == (504, "timeout")
        body = {"prompt": "a", "max_tokens": 200, "stream": True}
        *pieces, last, end = ask(base, COMPLETIONS, body).body.split(b"\n\n")[:-1]
        assert pieces
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "timeout"
        assert end == b"data: [DONE]"


def test_a_longer_body_may_hold_a_longer_prompt():
    with serving(service_of(ScriptedEngine(), body=4_100_000)) as base:
        reply = ask(base, COMPLETIONS, {"prompt": 4_000_100 * "a"})
        assert "the prompt has 4000100 characters" in reply.error["message"]


def test_a_prompt_may_be_limited_below_the_context():
    with serving(service_of(ScriptedEngine(saying("x")), most_prompt=5)) as base:
        assert ask(base, COMPLETIONS, {"prompt": "abcd"}).status == 200
        reply = ask(base, COMPLETIONS, {"prompt": "abcde"})
        assert reply.error["code"] == "context_length_exceeded"
        assert ask(base, CHATS, {"messages": [HI]}).error["param"] == "messages"


def test_told_to_leave_a_server_cuts_what_does_not_end_in_time():
    engine = ScriptedEngine(seconds=0.1)
    began = time.monotonic()
    with serving(service_of(engine), drain_seconds=1) as base:
        client = open_socket(base)
        body = {"prompt": "a", "max_tokens": 250, "stream": True}
        client.sendall(raw_request(COMPLETIONS, json.dumps(body).encode()))
        until(lambda: engine.pending == 1)
    assert time.monotonic() - began < 10
    assert b"[DONE]" not in read_all(client)
    client.close()


def test_a_failed_engine_fails_its_requests_and_says_so():
    engine = ScriptedEngine(fails_at=30, seconds=0.01)
    service = service_of(engine)
    with serving(service) as base:
        failed = threading.Event()
        service.thread.on_failure = failed.set
        reply = ask(base, COMPLETIONS, {"prompt": "a", "max_tokens": 100})
        assert (reply.status, reply.error["type"]) == (500, "server_error")
        assert failed.wait(5)
        assert ask(base, "/health").status == 503
        assert ask(base, COMPLETIONS, {"prompt": "a"}).status == 503
        assert ask(base, "/metrics").status == 503


def test_a_fault_of_an_endpoint_is_500_and_the_server_goes_on(monkeypatch, caplog):
    service = service_of(ScriptedEngine(saying("x")))
    with serving(service) as base:
        with monkeypatch.context() as patch:
            patch.setattr("dsv3_jax.server.bodies.parse", lambda kind, body: 1 / 0)
            reply = ask(base, COMPLETIONS, {"prompt": "a"})
        assert reply.status == 500
        assert "division" not in reply.error["message"]
        assert ask(base, COMPLETIONS, {"prompt": "a"}).status == 200
    assert "division by zero" in caplog.text
