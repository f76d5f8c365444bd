"""Models that say what they are told to, in this process or behind a port; no weights."""

import contextlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dsv3_jax.posttrain.completions import Ask, Completion, Failure
from dsv3_jax.posttrain.problems import Problem, read_problems
from dsv3_jax.posttrain.templates import TEMPLATES


def write_lines(path: Path, *lines: Any) -> Path:
    """A file of JSON Lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def problems_of(folder: Path, *lines: Any, kind: str | None = "reasoning_original", **values: str):
    """As the command reads them."""
    file = write_lines(folder / "prompts.jsonl", *lines)
    return read_problems(file, TEMPLATES, kind, values)


def problem(**changes: Any) -> Problem:
    """A small one."""
    fields = {
        "id": "1",
        "kind": "reasoning_original",
        "where": "p.jsonl line 1",
        "prompt": "What is 1 + 1?",
        "messages": [{"role": "user", "content": "What is 1 + 1?"}],
        "reference": "2",
        "response": None,
        "template": {},
        "keeps_reasoning": False,
    }
    return Problem(**fields | changes)


@dataclass
class ScriptedModel:
    """A source whose answers are a function of what is asked."""

    says: Callable[[Ask], Completion | Failure]
    described: Mapping[str, Any] = field(default_factory=lambda: {"model": "scripted"})
    asked: list[Ask] = field(default_factory=list)
    backwards: bool = False
    """Answers come in the opposite order"""

    def answers(self, asks: Sequence[Ask]) -> Iterator[tuple[Ask, Completion | Failure]]:
        for ask in reversed(asks) if self.backwards else asks:
            self.asked.append(ask)
            yield ask, self.says(ask)


@contextlib.contextmanager
def scripted_server(
    answer: Callable[[int, dict[str, Any]], tuple[int, Any]],
    models: Sequence[str] | None = ("scripted",),
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Its address, and the bodies that it was asked with, each with its path and headers.

    `answer` of the request's number and body: a status, and what is sent (bytes as they are). A
    status of 0 hangs up. Without `models` it has no list of them.
    """
    asked: list[dict[str, Any]] = []
    numbers = itertools.count()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = {"data": [{"id": name} for name in models or ()]}
            self.reply(404 if models is None else 200, found)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body | {"path": self.path, "headers": dict(self.headers)})
            self.reply(*answer(next(numbers), body))

        def reply(self, status: int, found: Any) -> None:
            if not status:
                self.connection.close()
                return
            data = found if isinstance(found, bytes) else json.dumps(found).encode()
            with contextlib.suppress(OSError):  # whoever asked may have been killed
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "/elsewhere")
                if status == 429:
                    self.send_header("Retry-After", "0.01")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # a client that was killed is no error of ours
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join(30)
        server.server_close()


def chat(text: str | None, *, finish: str = "stop", tokens: int = 3, **more: Any) -> dict[str, Any]:
    """A chat completion."""
    message = {"role": "assistant", "content": text, **more}
    return {
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 1, "completion_tokens": tokens},
    }
