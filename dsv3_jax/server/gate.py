"""What every request passes first: the size of its headers, other sites' pages, keys."""

import ipaddress
import logging
import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsv3_jax.server.errors import Refusal
from dsv3_jax.server.http import MOST_HEADERS
from dsv3_jax.server.keys import Keys
from dsv3_jax.server.metrics import Metrics

_OPEN_PATHS = ("/", "/health")
# Names of this machine that no site can have.
_HERE = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?")
_LOG = logging.getLogger(__name__)
_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]


class Gate:
    """Around an application: who may enter, and what they hear if something fails."""

    def __init__(self, app: ASGIApp, keys: Keys, metrics: Metrics, paths: frozenset[str]) -> None:
        """`paths` are told of by name; others count as one."""
        self._app, self._keys, self._metrics, self.paths = app, keys, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
                path = scope["path"] if scope["path"] in self.paths else "other"
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
        if not self._is_own(headers, scope):
            raise Refusal(403, "another site's page; allowed: this server's own, and no browser")
        if scope["path"] in _OPEN_PATHS or not self._keys:
            return
        if not self._keys.open(headers.get("authorization", "").encode("latin-1")):
            said = "no key, or a wrong one; allowed: 'Authorization: Bearer KEY'"
            raise Refusal(401, said, code="invalid_api_key")

    def _is_own(self, headers: Headers, scope: Scope) -> bool:
        """A page of another site may send requests from its reader's browser, which names the site
        as their origin. A site's name may lead to this machine, too (DNS rebinding), and is then
        both origin and host: without keys a loopback address answers to its own names alone.
        """
        origin = headers.get("origin")
        if origin is None:
            return True
        site = origin.partition("://")[2]
        if not site or site != headers.get("host"):
            return False
        if self._keys or not ipaddress.ip_address(scope["server"][0]).is_loopback:
            return True
        return _HERE.fullmatch(site) is not None
