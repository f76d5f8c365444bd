"""Text to ids and back over HTTP, under vLLM's names: clients that count tokens, as lm-eval does,
need no tokenizer of their own.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dsv3_jax.server.bodies import read
from dsv3_jax.server.jobs import Jobs
from dsv3_jax.server.protocol import Ids, Strict


class TokenizeRequest(Strict):
    """`/tokenize`."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    """Whether the token that begins a text comes first"""


class DetokenizeRequest(Strict):
    """`/detokenize`."""

    tokens: Ids
    model: str | None = None


def routes(jobs: Jobs, most_body: int) -> list[Route]:
    """`/tokenize`, `/detokenize`, `/tokenizer_info`."""
    tokenizer = jobs.tokenizer

    def tokenized(asked: TokenizeRequest) -> dict[str, Any]:
        jobs.check_model(asked.model)
        mark = tokenizer.added_tokens.get(asked.prompt)  # a mark alone is asked for as such
        ids = tokenizer.encode(asked.prompt).tolist() if mark is None else [mark]
        tokens = [jobs.bos_id, *ids] if asked.add_special_tokens else ids
        return {"count": len(tokens), "max_model_len": jobs.room, "tokens": tokens}

    def detokenized(asked: DetokenizeRequest) -> dict[str, Any]:
        jobs.check_model(asked.model)
        return {"prompt": tokenizer.decode(asked.tokens)}

    def answering(
        kind: Any, answer: Callable[[Any], dict[str, Any]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def respond(request: Request) -> Response:
            return JSONResponse(await read(request, most_body, kind, answer))

        return respond

    async def info(request: Request) -> Response:
        marks = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        spelt = {name: tokenizer.spelling_of(token) for name, token in marks.items()}
        return JSONResponse(spelt | {"chat_template": jobs.template.source})

    return [
        Route("/tokenize", answering(TokenizeRequest, tokenized), methods=["POST"]),
        Route("/detokenize", answering(DetokenizeRequest, detokenized), methods=["POST"]),
        Route("/tokenizer_info", info),
    ]
