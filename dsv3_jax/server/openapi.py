"""The server's description in OpenAPI, made from what it takes."""

from typing import Any

from dsv3_jax import __version__
from dsv3_jax.server.protocol import ChatRequest, CompletionRequest
from dsv3_jax.server.tokenizing import DetokenizeRequest, TokenizeRequest

_REFS = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}


def description() -> dict[str, Any]:
    """OpenAPI 3.1."""
    schemas: dict[str, Any] = {"Error": _ERROR}
    paths: dict[str, Any] = {}
    for path, kind, said in (
        ("/v1/completions", CompletionRequest, "Continues a text"),
        ("/v1/chat/completions", ChatRequest, "Answers a conversation"),
        ("/tokenize", TokenizeRequest, "Ids of a text"),
        ("/detokenize", DetokenizeRequest, "The text of ids"),
    ):
        schema = kind.model_json_schema(ref_template=_REFS)
        schemas |= schema.pop("$defs", {}) | {kind.__name__: schema}
        content = {"application/json": {"schema": {"$ref": _REFS.format(model=kind.__name__)}}}
        body = {"required": True, "content": content}
        paths[path] = {"post": _operation(said) | {"requestBody": body}}
    for path, said in (
        ("/v1/models", "The model that is served"),
        ("/v1/models/{name}", "It, by its name"),
        ("/tokenizer_info", "Its marks and its chat template"),
        ("/health", "Whether the engine works"),
        ("/metrics", "Counts and times, for Prometheus"),
    ):
        paths[path] = {"get": _operation(said)}
    paths["/v1/models/{name}"]["get"]["parameters"] = [_NAME]
    return {
        "openapi": "3.1.0",
        "info": {"title": "dsv3_jax", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _operation(said: str) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": _REFS.format(model="Error")}}}
    return {
        "summary": said,
        "responses": {
            "200": {"description": "As OpenAI's"},
            "4XX": {"description": "What is wrong with the request", "content": error},
            "5XX": {"description": "What is wrong with the server", "content": error},
        },
    }
