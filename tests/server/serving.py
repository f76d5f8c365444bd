"""A server at work in a thread of the test's own process, on a port of its own."""

import contextlib
import threading
import time
from collections.abc import Iterator

from dsv3_jax.server.app import Service, make_app
from dsv3_jax.server.http import bound, make_server


@contextlib.contextmanager
def serving(service: Service, *, connections: int = 64, drain_seconds: int = 5) -> Iterator[str]:
    """Its address, http://127.0.0.1:port, while the block lasts."""
    listening = bound("127.0.0.1", 0)
    port = listening.getsockname()[1]
    server = make_server(make_app(service), connections=connections, drain_seconds=drain_seconds)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server does not end"
