"""Connections that cost something and bring nothing are dropped in time."""

import asyncio
from unittest.mock import Mock

from uvicorn.server import ServerState

from dsv3_jax.server import http
from dsv3_jax.server.app import make_app
from tests.server.clients import ask, open_socket, read_all, until
from tests.server.scripted import ScriptedEngine, service_of
from tests.server.serving import serving


def test_who_never_takes_a_small_answer_is_left_too(monkeypatch):
    """Less than stops writing is still to be sent when the connection has been idle for long."""
    monkeypatch.setattr(http.GuardedProtocol, "stall_seconds", 0.01)
    monkeypatch.setattr(http.GuardedProtocol, "receive_seconds", 60)
    app = make_app(service_of(ScriptedEngine()))
    config = http.make_server(app, connections=4, drain_seconds=1).config
    transport = Mock(spec=asyncio.Transport)
    transport.is_closing.return_value = False

    async def work() -> None:
        protocol = http.GuardedProtocol(config, ServerState(), {})
        protocol.connection_made(transport)
        protocol.timeout_keep_alive_handler()
        transport.close.assert_called_once()
        await asyncio.sleep(0.1)

    asyncio.run(work())
    transport.abort.assert_called_once()


def test_far_beyond_them_there_is_no_answer_so_that_files_remain(monkeypatch):
    monkeypatch.setattr(http, "MOST_TOLD", 2)
    with serving(service_of(ScriptedEngine()), connections=3) as base:
        clients = [open_socket(base) for _ in range(12)]
        for client in clients[5:]:
            assert read_all(client) == b""
        for client in clients:
            client.close()
        until(lambda: ask(base, "/health").status == 200)
