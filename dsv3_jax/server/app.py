"""The application: which path answers what."""

import base64
import contextlib
import hashlib
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dsv3_jax.server import tokenizing
from dsv3_jax.server.engine_thread import EngineThread
from dsv3_jax.server.errors import Refusal, failed, http_error, refused
from dsv3_jax.server.gate import Gate
from dsv3_jax.server.generating import Generating, Limits
from dsv3_jax.server.jobs import Jobs
from dsv3_jax.server.keys import Keys
from dsv3_jax.server.metrics import Metrics, see
from dsv3_jax.server.openapi import description
from dsv3_jax.server.protocol import ChatRequest, CompletionRequest


@dataclass(frozen=True)
class Service:
    """What an application is made of."""

    thread: EngineThread
    jobs: Jobs
    keys: Keys
    limits: Limits


def make_app(service: Service) -> Gate:
    """The engine's thread begins and ends with the application."""
    metrics = Metrics()
    completions = (CompletionRequest, service.jobs.of_completion)
    chats = (ChatRequest, service.jobs.of_chat)

    def generating(kind: Any, job_of: Callable) -> Generating:
        return Generating(kind, job_of, service.thread, metrics, service.limits)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.thread.start()
        try:
            yield
        finally:
            await service.thread.stop()

    routes = [
        Route("/v1/completions", generating(*completions), methods=["POST"]),
        Route("/v1/chat/completions", generating(*chats), methods=["POST"]),
        *tokenizing.routes(service.jobs, service.limits.body),
        *_plain_routes(service, metrics),
    ]
    handlers = {HTTPException: http_error, Refusal: refused, Exception: failed}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Gate(app, service.keys, metrics, frozenset(route.path for route in routes))


def _plain_routes(service: Service, metrics: Metrics) -> list[Route]:
    model = _model(service.jobs)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        if request.path_params["name"] != model["id"]:
            raise Refusal(404, f"no such model; allowed: {model['id']}", "model", "model_not_found")
        return JSONResponse(model)

    async def health(request: Request) -> Response:
        failed = service.thread.failure is not None
        return JSONResponse({"status": "failed" if failed else "ok"}, 503 if failed else 200)

    async def told(request: Request) -> Response:
        text = metrics.text(await service.thread.look(see))
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(request: Request) -> Response:
        return JSONResponse(description())

    return [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/health", health),
        Route("/metrics", told),
        Route("/openapi.json", openapi),
        Route("/", _page()),
    ]


def _model(jobs: Jobs) -> dict[str, Any]:
    return {
        "id": jobs.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "dsv3_jax",
        "max_model_len": jobs.room,
    }


def _page() -> Callable:
    """The chat page. Nothing but its own script and style runs in it, and nothing comes from or
    goes to another place.
    """
    page = resources.files("dsv3_jax.server").joinpath("chat.html").read_text("utf-8")
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash_of(page, 'script')}",
            f"style-src {_hash_of(page, 'style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
    headers = {"content-security-policy": policy, "referrer-policy": "no-referrer"}

    async def show(request: Request) -> Response:
        return Response(page, headers=headers, media_type="text/html")

    return show


def _hash_of(page: str, name: str) -> str:
    """Of an element's content, as a policy names it."""
    content = re.search(rf"<{name}>(.*?)</{name}>", page, re.DOTALL)[1]
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
