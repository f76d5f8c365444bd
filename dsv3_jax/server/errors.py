"""Errors in the shape that OpenAI's clients know."""

import json
from dataclasses import dataclass

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
