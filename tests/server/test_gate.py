"""Who may enter: no page of another site, by any name, and nobody without a key where there are
some.
"""

import asyncio
import socket
from collections.abc import Iterator

import pytest

from dsv3_jax.server.gate import Gate
from dsv3_jax.server.keys import Keys
from dsv3_jax.server.metrics import Metrics
from tests.server.clients import JSON, ask
from tests.server.scripted import ScriptedEngine, saying, service_of
from tests.server.serving import serving

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    with serving(service_of(ScriptedEngine(saying("fine")))) as found:
        yield found


def test_other_sites_pages_are_refused(base):
    own = base.removeprefix("http://")
    for origin, status in (
        (f"http://{own}", 200),
        ("https://evil.example", 403),
        ("null", 403),
        ("http://[", 403),
    ):
        reply = ask(base, COMPLETIONS, {"prompt": "a"}, headers=JSON | {"origin": origin})
        assert reply.status == status


HOSTS = [
    ("localhost:8000", 200),
    ("127.0.0.1", 200),
    ("[::1]:8000", 200),
    ("192.168.0.7:80", 200),
    (f"{socket.gethostname()}:8000", 200),
    ("evil.example:8000", 403),
    ("127.0.0.1.evil.example", 403),
    ("localhost.evil.example", 403),
]


@pytest.mark.parametrize(("host", "status"), [*HOSTS, ("", 403)])
def test_a_sites_name_that_leads_here_is_refused(base, host, status):
    """DNS rebinding: its page's origin is the host that it asks."""
    headers = JSON | {"host": host, "origin": f"http://{host}"}
    assert ask(base, COMPLETIONS, {"prompt": "a"}, headers=headers).status == status


@pytest.mark.parametrize(("host", "status"), HOSTS)
def test_nor_may_its_page_read_here(base, host, status):
    """Such a request has no origin, and over plain HTTP nothing else of a browser's."""
    for path in ("/metrics", "/v1/models", "/tokenizer_info", "/"):
        for more in ({}, {"sec-fetch-site": "same-origin"}):
            assert ask(base, path, headers={"host": host} | more).status == status


@pytest.mark.parametrize(
    ("address", "status"), [("127.0.0.1", 403), ("::ffff:127.0.0.1", 403), ("10.0.0.7", 200)]
)
def test_loopback_addresses_are_known_as_ipv6_has_them(address, status):
    """Which a server that listens to all addresses with `--host ::` hears of."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"evil.example"), (b"origin", b"http://evil.example")]
    scope = {"type": "http", "path": "/", "server": (address, 8000), "headers": headers}
    asyncio.run(Gate(app, Keys(), Metrics(), frozenset())(scope, None, send))
    assert sent[0]["status"] == status


def test_who_has_a_key_may_come_by_any_name():
    """Through a proxy, which passes on the name that it has."""
    headers = JSON | {"host": "ours.example", "origin": "https://ours.example"}
    with serving(service_of(ScriptedEngine(saying("x")), keys=Keys(["k"]))) as base:
        assert ask(base, "/", headers={"host": "ours.example"}).status == 200
        for key, status in (("k", 200), ("other", 401)):
            told = headers | {"authorization": f"Bearer {key}"}
            assert ask(base, COMPLETIONS, {"prompt": "a"}, headers=told).status == status


def test_headers_keep_browsers_from_guessing(base):
    for path in ("/", "/health", "/nowhere"):
        headers = ask(base, path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers
    assert "default-src 'none'" in ask(base, "/").headers["content-security-policy"]


def test_keys_open_all_but_the_page_and_the_health(capfd):
    with serving(service_of(ScriptedEngine(saying("x")), keys=Keys(["k1", "k2"]))) as base:
        for sent in ("", "Bearer", "Bearer k", "Bearer k1k1", "Basic k1", "k1", "Bearer é"):
            headers = JSON | ({"authorization": sent} if sent else {})
            for path in (COMPLETIONS, CHATS, "/metrics", "/v1/models", "/openapi.json", "/x"):
                reply = ask(base, path, b"{}", headers=headers)
                assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
                assert reply.headers["www-authenticate"] == "Bearer"
        for sent in ("Bearer k1", "bearer  k2 "):
            headers = JSON | {"authorization": sent}
            assert ask(base, COMPLETIONS, {"prompt": "a"}, headers=headers).status == 200
        assert {ask(base, path).status for path in ("/", "/health")} == {200}
    assert "k1" not in "".join(capfd.readouterr())
