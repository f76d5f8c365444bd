"""What every request passes first: keys, other sites' pages, sizes; and errors on their way out."""

import logging
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsv3_jax.server.errors import Refusal
from dsv3_jax.server.http import MOST_HEADERS
from dsv3_jax.server.keys import Keys
from dsv3_jax.server.metrics import Metrics

OPEN_PATHS = ("/", "/health")
_LOG = logging.getLogger(__name__)
_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]


class Gate:
    """Around an application: who may enter, and what they hear if something fails."""

    def __init__(self, app: ASGIApp, keys: Keys, metrics: Metrics, paths: frozenset[str]) -> None:
        """`paths` are told of by name; others count as one."""
        self._app, self._keys, self._metrics, self._paths = app, keys, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
                path = scope["path"] if scope["path"] in self._paths else "other"
                self._metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        try:
            self._check(scope)
        except Refusal as refusal:
            await refusal.response()(scope, receive, told)
            return
        try:
            await self._app(scope, receive, told)
        except Exception:  # its client has heard of it, by `failed` or by an end too early
            _LOG.exception("a request failed")

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MOST_HEADERS:
            raise Refusal(431, f"the headers are too long; allowed: {MOST_HEADERS} bytes")
        # A page of another site may send requests from its reader's browser, and is named here.
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            raise Refusal(403, "another site's page; allowed: this server's own, and no browser")
        if scope["path"] in OPEN_PATHS or not self._keys:
            return
        if not self._keys.open(headers.get("authorization", "").encode("latin-1")):
            said = "no key, or a wrong one; allowed: 'Authorization: Bearer KEY'"
            raise Refusal(401, said, code="invalid_api_key")


async def body_of(request: Request, most: int) -> bytes:
    """Of JSON. Refusal if it is no JSON by its own words, or longer than `most` bytes."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, "the body's content-type; allowed: application/json")
    too_long = Refusal(413, f"the body is too long; allowed: {most} bytes")
    stated = request.headers.get("content-length", "0")
    if not stated.isdecimal() or int(stated[:20]) > most:
        raise too_long
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > most:
            raise too_long
    return bytes(body)


async def refused(request: Request, refusal: Refusal) -> Response:
    """What an endpoint raised."""
    return refusal.response()


async def failed(request: Request, error: Exception) -> Response:
    """What no endpoint should raise."""
    return Refusal(500, "the server failed at this request; its log tells how").response()


async def http_error(request: Request, error: HTTPException) -> Response:
    """What routes refuse: no such path, another method."""
    said = {404: "no such path", 405: "no such method here"}.get(error.status_code, error.detail)
    response = Refusal(error.status_code, said).response()
    response.headers.update(error.headers or {})
    return response
