"""What every request passes first: the size of its headers, other sites' pages, keys."""

import ipaddress
import logging
import re
import socket

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsv3_jax.server.errors import Refusal
from dsv3_jax.server.http import MOST_HEADERS
from dsv3_jax.server.keys import Keys
from dsv3_jax.server.metrics import Metrics

_OPEN_PATHS = ("/", "/health")
# What no site's name can be: an address, and the names that this machine has for itself.
_HERE = re.compile(
    rf"(localhost|{re.escape(socket.gethostname())}|\d+(\.\d+){{3}}|\[[\da-f:.]+\])(:\d+)?", re.I
)
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
        _check_page(headers)
        if not self._keys and _is_loopback(scope["server"][0]):
            _check_name(headers)
        if scope["path"] in _OPEN_PATHS or not self._keys:
            return
        if not self._keys.open(headers.get("authorization", "").encode("latin-1")):
            said = "no key, or a wrong one; allowed: 'Authorization: Bearer KEY'"
            raise Refusal(401, said, code="invalid_api_key")


def _check_page(headers: Headers) -> None:
    """A page of another site may send requests from its reader's browser, which names the site as
    their origin.
    """
    origin = headers.get("origin")
    if origin is None:
        return
    site = origin.partition("://")[2]
    if not site or site != headers.get("host"):
        raise Refusal(403, "another site's page; allowed: this server's own, and no browser")


def _check_name(headers: Headers) -> None:
    """A site's name may lead to this machine, too (DNS rebinding), and is then the host of whatever
    its page asks for. What the page merely reads has no origin; nor has it Sec-Fetch-Site, which
    browsers keep for hosts that they trust. What has no host comes from no browser.
    """
    host = headers.get("host")
    if host and not _HERE.fullmatch(host):
        said = "allowed: localhost, this machine's name or an address; with keys any"
        raise Refusal(403, f"the host is no name of this server's; {said}")


def _is_loopback(host: str) -> bool:
    """Also of IPv4's addresses as IPv6 has them, ::ffff:127.0.0.1."""
    address = ipaddress.ip_address(host)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
