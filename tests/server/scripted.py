"""An engine that writes what it is told to, at its own pace: for tests of what stands around it."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, count, repeat
from types import SimpleNamespace

import numpy as np

from dsv3_jax.data.chat import ChatTemplate
from dsv3_jax.data.tokenizer import Tokenizer, train_tokenizer
from dsv3_jax.inference.pages import Pages
from dsv3_jax.inference.requests import Answer, Request, Scores
from dsv3_jax.inference.statistics import Statistics
from dsv3_jax.server.app import Service
from dsv3_jax.server.engine_thread import EngineThread
from dsv3_jax.server.generating import Limits
from dsv3_jax.server.jobs import Jobs
from dsv3_jax.server.keys import Keys

VOCAB, LONGEST, LOGPROB = 262, 256, -0.5
TOKENIZER: Tokenizer = train_tokenizer(["some text"], VOCAB)  # a byte a token
END = TOKENIZER.eos_id


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text).tolist()


def counting(request: Request) -> Iterator[int]:
    """0, 1, 2 ... without end."""
    for number in count():
        yield from ids_of(f"{number} ")


def saying(text: str) -> Callable[[Request], Iterator[int]]:
    """A text and its end, again and again for who does not end there."""
    return lambda request: chain(ids_of(text), repeat(END))


@dataclass
class ScriptedEngine:
    """A token of each text a turn; as many texts as it has rows, in the order of their coming."""

    writes: Callable[[Request], Iterator[int]] = counting
    seconds: float = 0.001
    """Of a turn"""
    rows: int = 4
    fails_at: int | None = None
    """A turn that raises"""
    gate: threading.Semaphore | None = None
    """Every turn passes it"""
    turns: int = 0
    texts: dict[int, tuple[Request, Iterator[int]]] = field(default_factory=dict)
    cancelled: list[int] = field(default_factory=list)
    written: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.room = LONGEST
        self.statistics = Statistics(offered=[0], accepted=[0])
        self.scheduler = SimpleNamespace(running=[], waiting=[], pages=[Pages(8, 4)])
        self._ids = count()

    @property
    def pending(self) -> int:
        return len(self.texts)

    def check(self, request: Request) -> int:
        request.check(VOCAB, LONGEST)
        return min(len(request.prompt) + request.max_tokens, LONGEST)

    def submit(self, request: Request) -> int:
        self.check(request)
        number = next(self._ids)
        self.texts[number], self.written[number] = (request, self.writes(request)), 0
        return number

    def cancel(self, number: int) -> bool:
        self.cancelled.append(number)
        return self.texts.pop(number, None) is not None

    def read_prompts(self) -> list[Answer]:
        return []

    def go_on(self) -> list[Answer]:
        self.turns += 1
        if self.turns == self.fails_at:
            raise ArithmeticError("as planned")
        if self.gate is not None:
            assert self.gate.acquire(timeout=30)
        time.sleep(self.seconds)
        return [self._answer(number) for number in list(self.texts)[: self.rows]]

    def total_loads(self) -> np.ndarray:
        return np.array([[1, 3], [2, 2]])

    def _answer(self, number: int) -> Answer:
        request, tokens = self.texts[number]
        token, first = next(tokens), not self.written[number]
        self.written[number] += 1
        self.statistics.written += 1
        ended = (
            "length" if self.written[number] >= self.check(request) - len(request.prompt) else None
        )
        ended = "stop" if token in request.end_ids else ended
        if ended:
            del self.texts[number]
        top = [[(token, LOGPROB), (5, -2.0)]]
        scores = None
        if request.prompt_logprobs and first:
            others = len(request.prompt) - 1
            scores = Scores([LOGPROB] * others, [[(t, LOGPROB)] for t in request.prompt[1:]])
        return Answer(number, [token], [LOGPROB], top, ended, scores)


def service_of(
    engine: ScriptedEngine,
    *,
    queue: int = 8,
    keys: Keys | None = None,
    body: int = 100_000,
    seconds: float = 20.0,
    most_prompt: int = LONGEST - 1,
) -> Service:
    """A whole service around it; it is called `scripted`."""
    jobs = Jobs(
        "scripted",
        TOKENIZER,
        ChatTemplate(TOKENIZER),
        TOKENIZER.bos_id,
        frozenset([END]),
        engine.room,
        most_prompt,
    )
    return Service(EngineThread(engine, queue), jobs, keys or Keys(), Limits(body, seconds))
