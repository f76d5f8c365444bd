"""Clients of a server under test: whole requests and answers, or bytes on a socket."""

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's shape, whole."""
        assert self.status >= 400
        assert self.headers["content-type"] == "application/json"
        found = self.json()
        assert set(found) == {"error"}
        assert set(found["error"]) == {"message", "type", "param", "code"}
        assert "Traceback" not in found["error"]["message"]
        assert "\n" not in found["error"]["message"]
        return found["error"]


def ask(
    base: str,
    path: str,
    body: Any = None,
    *,
    method: str | None = None,
    headers: dict[str, str] | None = None,
) -> Reply:
    """GET without a body, else POST; what is not bytes is sent as JSON."""
    place = urlsplit(base)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    method = method or ("GET" if body is None else "POST")
    try:
        connection.request(method, path, data, JSON if headers is None else headers)
        reply = connection.getresponse()
        found = {name.lower(): value for name, value in reply.getheaders()}
        return Reply(reply.status, found, reply.read())
    finally:
        connection.close()


@contextlib.contextmanager
def streaming(base: str, path: str, body: bytes) -> Iterator[http.client.HTTPResponse]:
    """An answer that has begun."""
    place = urlsplit(base)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
    try:
        connection.request("POST", path, body, JSON)
        yield connection.getresponse()
    finally:
        connection.close()


def events(body: bytes) -> Iterator[Any]:
    """Of a stream's whole body; it ends as it should."""
    *pieces, done, rest = body.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    for piece in pieces:
        assert piece.startswith(b"data: ")
        yield json.loads(piece.removeprefix(b"data: "))


def open_socket(base: str) -> socket.socket:
    place = urlsplit(base)
    return socket.create_connection((place.hostname, place.port), timeout=30)


def raw_request(path: str, body: bytes, *more: str) -> bytes:
    """The bytes of a POST of JSON."""
    head = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json"]
    head += [f"content-length: {len(body)}", *more, "", ""]
    return "\r\n".join(head).encode() + body


def read_all(found: socket.socket) -> bytes:
    """Until the other side has closed, however it does."""
    data = b""
    try:
        while piece := found.recv(65536):
            data += piece
    except ConnectionError:
        pass
    return data


def until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    """Waits for it."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come to hold"
        time.sleep(0.005)
