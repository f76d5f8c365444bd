"""HTTP for clients that mean no good: uvicorn's protocol with limits of size and of time."""

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

IDLE_SECONDS = 15  # that a connection stays open between two requests
MOST_TOLD = 64  # clients beyond the most who hear that there are too many; others hear nothing
BACKLOG = 128  # connections that wait to be accepted
MOST_HEADERS = 32 * 1024  # bytes of a request's line and headers


class GuardedProtocol(H11Protocol):
    """A connection that is dropped if a request does not arrive, or an answer is not taken, in
    time.
    """

    receive_seconds = stall_seconds = 30.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._receiving: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """The first request is awaited."""
        super().connection_made(transport)
        self._arrive_soon()
        if len(self.connections) >= self.limit_concurrency + MOST_TOLD:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited any more."""
        self._receiving, self._stalled = _stop(self._receiving), _stop(self._stalled)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """More of a request, or its end."""
        super().data_received(data)
        if self.transport.is_closing():
            self._leave_soon()
        elif self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._arrive_soon()
        else:
            self._receiving = _stop(self._receiving)
            # uvicorn reads nothing more before its answer, and so would not see its client leave.
            if len(self.conn.trailing_data[0]) <= MOST_HEADERS:
                self.flow.resume_reading()

    def pause_writing(self) -> None:
        """The client takes no more."""
        super().pause_writing()
        self._leave_soon()

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        self._stalled = _stop(self._stalled)

    def on_response_complete(self) -> None:
        """A closed connection waits until its client has taken all; the next request may have
        begun.
        """
        super().on_response_complete()
        if self.transport.is_closing():
            self._leave_soon()
        elif self.conn.their_state is h11.SEND_BODY:
            self._arrive_soon()

    def timeout_keep_alive_handler(self) -> None:
        """No further request came. What was answered may not have been taken yet."""
        super().timeout_keep_alive_handler()
        self._leave_soon()

    def _arrive_soon(self) -> None:
        if self._receiving is None:
            self._receiving = self.loop.call_later(self.receive_seconds, self.transport.abort)

    def _leave_soon(self) -> None:
        if self._stalled is None:
            self._stalled = self.loop.call_later(self.stall_seconds, self.transport.abort)


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens, so that nobody else can have its address; who comes before there is
    a server waits for it. OSError if the address is not to be had.
    """
    family, kind, number, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    found = socket.socket(family, kind, number)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(BACKLOG)
    except OSError:
        found.close()
        raise
    return found


class Server(uvicorn.Server):
    """uvicorn's, which says when it can be reached."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens."""
        await super().startup(sockets)
        self._ready()


def make_server(
    app: Any,
    *,
    connections: int,
    drain_seconds: int,
    ready: Callable[[], None] = lambda: None,
) -> Server:
    """`connections` at the same time; at its end it waits so long for answers under way. `ready`
    is called when it listens.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # every bad request has a line
    config = uvicorn.Config(
        app,
        http=GuardedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=connections + 1,  # uvicorn refuses at its limit, not beyond it
        backlog=BACKLOG,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=drain_seconds,
        h11_max_incomplete_event_size=MOST_HEADERS,
    )
    return Server(config, ready)
