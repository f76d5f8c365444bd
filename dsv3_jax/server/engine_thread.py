"""The engine in a thread of its own, and requests that reach it from an event loop.

The engine is for one thread, and a turn of it takes the time of a step; the loop must answer in
between. So what the loop wants lies in an inbox that the thread empties before each turn, and what
a turn brought goes to the loop in one piece. A request that is cancelled costs no further turn than
the one that is running.
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.requests import Answer, Request
from dsv3_jax.server.errors import Refusal

Value = TypeVar("Value")
_RECENT = 32  # ends of texts that a full server's advice to come again is made from


class Texts:
    """Texts that one client waits for; in the loop only."""

    def __init__(self, count: int) -> None:
        self.ids: list[int | None] = [None] * count
        self.open = count
        self.answers: asyncio.Queue[tuple[int, Answer] | BaseException] = asyncio.Queue()
        self.left = False


class EngineThread:
    """Runs turns while there are texts; `stop` ends it."""

    def __init__(self, engine: Engine, most_waiting: int) -> None:
        """`most_waiting`: texts beyond the engine's rows that may be open."""
        self.engine = engine
        self.capacity = engine.rows + most_waiting
        """Texts that may be open"""
        self.failure: BaseException | None = None
        """What ended the engine; nothing is served any more"""
        self.on_failure: Callable[[], None] = lambda: None
        self.open = 0
        """Texts that were asked for and have not ended"""
        self._ended: deque[float] = deque(maxlen=_RECENT)
        self._waiting: set[Texts | asyncio.Future] = set()
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._askers: dict[int, tuple[Texts, int]] = {}  # by the engine's id; of the thread
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """From within the loop that will ask."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Open texts are left where they are."""
        self._stopping = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join)

    # --- of the loop -----------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def ask(self, requests: Sequence[Request]) -> AsyncIterator[Texts]:
        """Has the texts written; what is not there at the end of the block is cancelled.

        Refusal for requests that cannot be served, and where there is no room for them now.
        """
        self.check_room(len(requests))
        self._check(requests)
        asked = Texts(len(requests))
        self.open += asked.open
        self._waiting.add(asked)
        self._post(lambda: self._submit(asked, requests))
        try:
            yield asked
        finally:
            self._waiting.remove(asked)
            self.open -= asked.open
            asked.left = True
            if asked.open:
                self._post(lambda: [self._cancel(number) for number in asked.ids])

    def _check(self, requests: Sequence[Request]) -> None:
        # Those of one prompt differ in nothing that could be wrong.
        for request in {id(request.prompt): request for request in requests}.values():
            try:
                self.engine.check(request)
            except ValueError as error:
                raise Refusal(400, str(error)) from None

    def check_room(self, count: int) -> None:
        """Refusal if so many texts cannot be begun now."""
        if self.failure is not None:
            raise Refusal(503, "the engine has failed")
        if count > self.capacity:
            raise Refusal(400, f"{count} texts at once; allowed: {self.capacity}", param="n")
        if self.open + count > self.capacity:
            raise Refusal(
                429,
                f"{self.open} texts are open; allowed: {self.capacity}",
                code="queue_full",
                retry_after=self.patience(count),
            )

    def patience(self, count: int) -> int:
        """Seconds, 1 to 60, after which so many more texts may well find room: as fast as the last
        ones have ended.
        """
        if len(self._ended) < 2:
            return 1
        pace = (self._ended[-1] - self._ended[0]) / (len(self._ended) - 1)
        return min(max(round(pace * count), 1), 60)

    async def answers(self, asked: Texts) -> AsyncIterator[tuple[int, Answer]]:
        """Which text, and more of it, until all have ended. Refusal if the engine fails."""
        while asked.open:
            found = await asked.answers.get()
            if isinstance(found, BaseException):
                raise Refusal(500, "the engine has failed") from found
            place, answer = found
            if asked.ids[place] is None:  # it was left since
                continue
            if answer.ended:
                self._end(asked, place)
            yield found

    def leave(self, asked: Texts, place: int) -> None:
        """Nobody wants more of a text. It may have ended already."""
        if (number := asked.ids[place]) is not None:
            self._end(asked, place)
            self._post(lambda: self._cancel(number))

    def _end(self, asked: Texts, place: int) -> None:
        asked.ids[place] = None
        asked.open -= 1
        self.open -= 1
        self._ended.append(time.monotonic())

    async def look(self, at: Callable[[Engine], Value]) -> Value:
        """What a function sees of the engine between two turns. Refusal if there is none."""
        if self.failure is not None:
            raise Refusal(503, "the engine has failed")
        future = self._loop.create_future()

        def tell(value: Any) -> None:
            if not future.done():
                future.set_result(value)

        def see() -> None:
            value = at(self.engine)
            self._in_loop(lambda: tell(value))

        self._waiting.add(future)
        self._post(see)
        try:
            return await future
        finally:
            self._waiting.discard(future)

    def _post(self, what: Callable[[], None]) -> None:
        self._inbox.append(what)
        self._wake.set()

    # --- of the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._wake.clear()
                while self._inbox:
                    self._inbox.popleft()()
                if self.engine.pending:
                    # Before the steps, which may take as long again: first tokens are waited for.
                    self._hand_out(self.engine.read_prompts())
                    self._hand_out(self.engine.go_on())
                else:
                    self._wake.wait()
        except BaseException as error:  # the loop must hear of it, whatever it is
            self.failure = error
            self._in_loop(self._fail)

    def _submit(self, asked: Texts, requests: Sequence[Request]) -> None:
        if asked.left:
            return
        for place, request in enumerate(requests):
            asked.ids[place] = self.engine.submit(request)
            self._askers[asked.ids[place]] = asked, place

    def _cancel(self, number: int | None) -> None:
        if self._askers.pop(number, None):
            self.engine.cancel(number)

    def _hand_out(self, answers: Sequence[Answer]) -> None:
        found = []
        for answer in answers:
            asked, place = self._askers[answer.id]
            found.append((asked, (place, answer)))
            if answer.ended:
                del self._askers[answer.id]
        if found:
            self._in_loop(lambda: [asked.answers.put_nowait(one) for asked, one in found])

    def _in_loop(self, what: Callable[[], Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            self._loop.call_soon_threadsafe(what)

    def _fail(self) -> None:
        for one in self._waiting:
            if isinstance(one, Texts):
                one.answers.put_nowait(self.failure)
            elif not one.done():
                one.set_exception(Refusal(503, "the engine has failed"))
        self.on_failure()
