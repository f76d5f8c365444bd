"""Errors in the shape that OpenAI's clients know."""

import json
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response


@dataclass(eq=False)
class Refusal(Exception):
    """A request is not served; `message` is one line that tells what is allowed."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None
    """Seconds"""

    @property
    def kind(self) -> str:
        """OpenAI's `type`."""
        kinds = {401: "authentication_error", 429: "rate_limit_error", 503: "overloaded_error"}
        default = "invalid_request_error" if self.status < 500 else "server_error"
        return kinds.get(self.status, default)

    def body(self) -> bytes:
        """JSON, in ASCII."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def response(self) -> Response:
        """For a client of OpenAI's."""
        headers = {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        return Response(self.body(), self.status, headers, "application/json")


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
