"""Answers from a server that speaks OpenAI's chat completions: ours, vLLM's, SGLang's, a hosted
service.

Requests go out from a few threads, each with one at a time. What may pass (no connection, a time
that runs out, 408, 409, 425, 429, 5xx, an answer that is none) is tried again after a growing
pause; what one prompt alone is to blame for (400, 413, 422) is that prompt's failure; all else ends
the work.
"""

import http.client
import json
import math
import queue
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from dsv3_jax.cli import to_stderr
from dsv3_jax.config.fields import check, shown
from dsv3_jax.posttrain.completions import (
    Ask,
    Completion,
    Failure,
    Unavailable,
    without_reasoning,
)
from dsv3_jax.posttrain.synthesis_options import Sampling

PASSING = frozenset({408, 409, 425, 429, *range(500, 600)})
OF_ONE_PROMPT = frozenset({400, 413, 422})
LONGEST_PAUSE = 60.0  # seconds, whatever a server asks for
_MOST_BYTES = 64 << 20  # of an answer
_TELL_SECONDS = 10.0  # between two lines about trouble that may pass
_SAID = 200  # characters of a server's own words that an error repeats


@dataclass(frozen=True)
class Server:
    """Where it is and how it is asked."""

    url: str
    """With or without its /v1"""
    model: str
    key: str | None = None
    concurrency: int = 8
    """Requests at the same time"""
    seconds: float = 600.0
    """That a connection may be silent"""
    retries: int = 5
    """Of one request, before the work ends"""
    pause: float = 1.0
    """Seconds before the first of these; each further one waits twice as long, up to a minute"""

    def check(self) -> None:
        """ValueError, in the names of the options."""
        try:
            address = urlsplit(self.url)
            is_http = address.scheme in ("http", "https") and bool(address.hostname)
            is_open = address.port != 0 and "@" not in address.netloc  # no password in a sample
        except ValueError:  # a port that is none
            is_http = is_open = False
        check("--server", shown(self.url), is_http and is_open, "http://host:port or https://host")
        check("--concurrency", self.concurrency, 1 <= self.concurrency <= 1024, "1 to 1024")
        check("--timeout", self.seconds, 0 < self.seconds < 1e7, "above 0, to 1e7")
        check("--retries", self.retries, 0 <= self.retries <= 100, "0 to 100")

    @property
    def base(self) -> str:
        """The address that paths are joined to."""
        url = self.url.rstrip("/")
        return url if urlsplit(url).path.endswith("/v1") else f"{url}/v1"


class ServedModel:
    """A model behind a server."""

    def __init__(self, server: Server, sampling: Sampling) -> None:
        """Asks the server what it serves. Unavailable if it cannot be reached or has no such
        model.
        """
        self._server, self._sampling = server, sampling
        self._told = -math.inf
        # Of requests: those of a call that was given up count until the server answers them.
        self._free = threading.BoundedSemaphore(server.concurrency)
        self.described: Mapping[str, Any] = {"model": server.model, "server": server.url}
        _check_model(self)

    def answers(self, asks: Sequence[Ask]) -> Iterator[tuple[Ask, Completion | Failure]]:
        """As they come. Unavailable once one of them cannot be had, after those that are there.
        Any thread may close them.
        """
        leaving = threading.Event()
        answered: queue.SimpleQueue = queue.SimpleQueue()

        def end() -> None:
            leaving.set()
            answered.put(None)

        return _Coming(self._coming(asks, leaving, answered), end)

    def _coming(
        self, asks: Sequence[Ask], leaving: threading.Event, answered: queue.SimpleQueue
    ) -> Iterator[tuple[Ask, Completion | Failure]]:
        """Until all are there, one cannot be had, or None is among those answered."""
        waiting: queue.SimpleQueue = queue.SimpleQueue()
        for ask in asks:
            waiting.put(ask)

        def work() -> None:
            while not leaving.is_set():
                try:
                    ask = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    answered.put((ask, self._answer(ask, leaving)))
                except Exception as error:  # it belongs to the thread that waits for the answers
                    answered.put((ask, error))

        # Daemons: a command that ends does not wait for a server that is silent.
        for _ in range(min(self._server.concurrency, len(asks))):
            threading.Thread(target=work, daemon=True).start()
        try:
            failed = None
            for _ in asks:
                if failed is not None and answered.empty():
                    break
                found = answered.get()
                if found is None:
                    return
                ask, answer = found
                if isinstance(answer, Exception):
                    failed = failed or answer
                    leaving.set()
                else:
                    yield ask, answer
            if failed is not None:
                raise failed
        finally:
            leaving.set()

    def _answer(self, ask: Ask, leaving: threading.Event) -> Completion | Failure:
        how = self._sampling
        body = {
            "model": self._server.model,
            "messages": ask.problem.messages,
            "temperature": how.temperature,
            "top_p": how.top_p,
            "max_tokens": how.max_tokens,
            "seed": ask.seed,
        }
        if how.stop:
            body["stop"] = list(how.stop)
        try:
            retries = self._server.retries
            return self.asked("/chat/completions", body, _completion, retries, leaving)
        except _Refused as refused:
            if refused.status in OF_ONE_PROMPT:
                return Failure(refused.said)
            raise Unavailable(f"--server {self._server.url}: {refused.said}") from None

    def asked(
        self,
        path: str,
        body: Any,
        read: Callable[[Any], Any],
        retries: int,
        leaving: threading.Event,
    ) -> Any:
        """What `read` makes of the answer's JSON. _Refused for a status that is not to pass;
        Unavailable after the last retry, and once nobody waits for it: `leaving`.
        """
        said = "not asked"
        for trial in range(retries + 1):
            try:
                with self._free:
                    if leaving.is_set():
                        break
                    return read(self._sent(path, body))
            except _Passing as passing:
                said, wanted = str(passing), passing.seconds
            if trial < retries:
                pause = self._server.pause * 2**trial * random.uniform(0.5, 1.0)
                pause = min(max(pause, wanted), LONGEST_PAUSE)
                if not leaving.is_set():
                    self._tell(f"{said}; again in {pause:,.0f} s")
                if leaving.wait(pause):
                    break
        times = "once" if trial == 0 else f"{trial + 1} times"
        raise Unavailable(f"--server {self._server.url}: {said}; tried {times}")

    def _tell(self, said: str) -> None:
        """On stderr, not for each of many requests that meet the same trouble."""
        now = time.monotonic()
        if now - self._told >= _TELL_SECONDS:
            self._told = now
            to_stderr(f"--server {self._server.url}: {said}")

    def _sent(self, path: str, body: Any) -> Any:
        """_Passing or _Refused for what is no answer."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._server.key is not None:
            headers["Authorization"] = f"Bearer {self._server.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._server.base + path, data, headers)
        try:
            with _OPENER.open(request, timeout=self._server.seconds) as answer:
                content = answer.read(_MOST_BYTES)
        except urllib.error.HTTPError as error:
            with error:
                said = f"answered {error.code} {_said(error)}".strip()
            if error.code in PASSING:
                raise _Passing(said, _seconds(error.headers.get("Retry-After"))) from None
            raise _Refused(error.code, said) from None
        except (OSError, http.client.HTTPException) as error:
            raise _Passing(f"cannot be reached: {_reason(error)}") from None
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise _Passing("answered what is no JSON") from None


class _Coming(Iterator):
    """Answers that any thread may end: a generator cannot be closed while one waits for it."""

    def __init__(self, answers: Iterator, end: Callable[[], None]) -> None:
        self._answers, self.close = answers, end

    def __next__(self) -> tuple[Ask, Completion | Failure]:
        return next(self._answers)


class _Passing(Exception):
    """Worth another try, after as many seconds if the server says so."""

    def __init__(self, said: str, seconds: float = 0.0) -> None:
        super().__init__(said)
        self.seconds = seconds


class _Refused(Exception):
    def __init__(self, status: int, said: str) -> None:
        super().__init__(said)
        self.status, self.said = status, said


class _Direct(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: the key would go along, and a POST become a GET."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_Direct)


def _check_model(model: ServedModel) -> None:
    """At once or not at all: who has mistyped an address should not wait. Servers without a list of
    models are asked all the same.
    """
    server = model._server
    try:
        served = model.asked("/models", None, _names, 0, threading.Event())
    except _Refused as refused:
        if refused.status in (404, 405):
            return
        raise Unavailable(f"--server {server.url}: {refused.said}") from None
    if served and server.model not in served:
        listed = ", ".join(sorted(served)[:10])
        raise Unavailable(f"--model {shown(server.model)} is not served; allowed: {listed}")


def _names(found: Any) -> list[str]:
    try:
        return [_whole(str(one["id"])) for one in found["data"]]
    except (TypeError, LookupError):
        raise _Passing("answered what is no list of models") from None


def _completion(found: Any) -> Completion:
    """vLLM, SGLang and DeepSeek's own service tell reasoning apart from the text."""
    try:
        choice = found["choices"][0]
        message = choice["message"]
        text, finish = message["content"] or "", choice["finish_reason"]
        beside = message.get("reasoning_content") or message.get("reasoning")
        tokens = (found.get("usage") or {}).get("completion_tokens")
    except (TypeError, LookupError, AttributeError):
        raise _Passing("answered what is no chat completion") from None
    if not isinstance(text, str) or not isinstance(beside, str | None):
        raise _Passing("answered what is no chat completion")
    answer, reasoning = without_reasoning(_whole(text))
    beside = beside and _whole(beside)
    tokens = tokens if type(tokens) is int else None
    return Completion(answer, beside or reasoning, finish == "length", tokens)


def _whole(text: str) -> str:
    """JSON can spell halves of surrogate pairs, which no UTF-8 has: \\ud800 alone."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _said(error: urllib.error.HTTPError) -> str:
    """A server's own words, in one line."""
    try:
        content = error.read(_MOST_BYTES)
        found = json.loads(content)
        said = found["error"]["message"]
    except (OSError, http.client.HTTPException, ValueError, TypeError, LookupError, RecursionError):
        said = error.reason
    return " ".join(_whole(str(said)).split())[:_SAID]


def _seconds(header: str | None) -> float:
    """Of a Retry-After header; dates are none."""
    try:
        return max(float(header or 0), 0.0)
    except ValueError:
        return 0.0


def _reason(error: Exception) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return "no answer in time (--timeout)"
    said = getattr(cause, "strerror", None) or cause
    return " ".join(str(said).split()) or type(cause).__name__
