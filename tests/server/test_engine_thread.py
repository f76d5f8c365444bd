"""What reaches the engine from its thread's inbox: what nobody wants costs not a turn more."""

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from dsv3_jax.inference.requests import Answer, Request
from dsv3_jax.server.engine_thread import EngineThread
from dsv3_jax.server.errors import Refusal
from tests.server.clients import ask, open_socket, raw_request, until
from tests.server.scripted import ScriptedEngine, service_of
from tests.server.serving import serving

BODY = {"prompt": "a", "max_tokens": 100}


def within(thread: EngineThread, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs it in a loop in which the thread works."""

    async def run() -> None:
        thread.start()
        try:
            async with asyncio.timeout(20):
                await work()
        finally:
            await thread.stop()

    asyncio.run(run())


@pytest.mark.parametrize("behind", [b"", b"POST /v1"], ids=["alone", "with more sent behind it"])
@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_costs_no_turn_but_the_one_that_runs(stream, behind):
    engine = ScriptedEngine(gate=threading.Semaphore(0), seconds=0)
    service = service_of(engine)
    with serving(service) as base:
        client = open_socket(base)
        body = json.dumps(BODY | {"stream": stream, "n": 3}).encode()
        client.sendall(raw_request("/v1/completions", body) + behind)
        for _ in range(5):
            engine.gate.release()
        until(lambda: engine.turns == 6)  # the sixth waits at the gate
        client.close()
        until(lambda: service.thread.open == 0)
        for _ in range(20):
            engine.gate.release()
        until(lambda: len(engine.cancelled) == 3)
        assert engine.turns == 6
        assert not engine.pending
        assert ask(base, "/v1/completions", BODY | {"max_tokens": 1}).status == 200


def test_a_stop_string_that_only_the_server_knows_ends_the_engines_work():
    engine = ScriptedEngine(gate=threading.Semaphore(0), seconds=0)
    service = service_of(engine)
    with serving(service) as base:
        answer = []
        body = BODY | {"stop": "2"}
        asking = threading.Thread(
            target=lambda: answer.append(ask(base, "/v1/completions", body)), daemon=True
        )
        asking.start()
        while asking.is_alive():
            engine.gate.release()
            asking.join(0.01)
        until(lambda: engine.gate.release() or engine.cancelled == [0])
        assert answer[0].json()["choices"][0]["text"] == "0 1 "
        assert engine.written[0] < 100


def test_texts_that_were_never_begun_never_begin():
    """They are asked for and left while a turn runs."""
    engine = ScriptedEngine(gate=threading.Semaphore(0), seconds=0)
    thread = EngineThread(engine, 8)

    async def work() -> None:
        async with thread.ask([Request([1], 50)]):
            await asyncio.to_thread(until, lambda: engine.turns == 1)
            async with thread.ask([Request([2], 50)]):
                pass
        engine.gate.release()
        await asyncio.to_thread(until, lambda: engine.cancelled == [0])
        assert len(engine.written) == 1

    within(thread, work)


def test_of_a_text_that_was_left_nothing_more_is_told_and_nothing_stays():
    """Several of its answers lie there when the first one is read."""
    thread = EngineThread(ScriptedEngine(), 8)

    async def work() -> None:
        async with thread.ask([Request([1], 50), Request([2], 5)]) as asked:
            while asked.answers.qsize() < 6:
                await asyncio.sleep(0.001)
            heard = []
            async for place, _ in thread.answers(asked):
                heard.append(place)
                if heard == [0]:
                    thread.leave(asked, 0)
        assert heard == [0, 1, 1, 1, 1, 1]
        await thread.look(lambda engine: None)
        assert not thread._waiting
        assert not thread._askers
        assert thread.open == 0

    within(thread, work)


class ReadingEngine(ScriptedEngine):
    """Has a text's first token when its prompt is read."""

    def read_prompts(self) -> list[Answer]:
        return [self._answer(number) for number in list(self.texts) if not self.written[number]]


def test_a_first_token_is_told_before_the_steps_behind_it():
    engine = ReadingEngine(gate=threading.Semaphore(0), seconds=0)
    thread = EngineThread(engine, 1)

    async def work() -> None:
        async with thread.ask([Request([1], 5)]) as asked:
            place, first = await anext(thread.answers(asked))
            assert (place, len(first.tokens)) == (0, 1)
            assert engine.written == {0: 1}
        engine.gate.release()

    within(thread, work)


def test_room_is_counted_in_texts_and_comes_back():
    engine = ScriptedEngine(rows=2)
    thread = EngineThread(engine, 1)

    async def work() -> None:
        with pytest.raises(Refusal, match="4 texts at once; allowed: 3"):
            async with thread.ask(4 * [Request([1], 9)]):
                pass
        async with thread.ask(2 * [Request([1], 9)]) as first:
            with pytest.raises(Refusal) as refused:
                async with thread.ask(2 * [Request([1], 9)]):
                    pass
            assert refused.value.status == 429
            async for _ in thread.answers(first):
                pass
            assert thread.open == 0
            async with thread.ask(3 * [Request([1], 9)]):
                pass
        assert thread.open == 0

    within(thread, work)


def test_texts_that_have_no_room_are_not_looked_at():
    """128 prompts with 128 answers each are 16 384 lists of tokens."""
    engine = ScriptedEngine(gate=threading.Semaphore(0))
    engine.check = None
    with serving(service_of(engine)) as base:
        body = {"prompt": [[5] * 200] * 128, "n": 128}
        assert "16384 texts at once" in ask(base, "/v1/completions", body).error["message"]


def test_a_prompt_with_many_answers_is_looked_at_once(monkeypatch):
    engine = ScriptedEngine()
    thread, looked = EngineThread(engine, 8), []
    monkeypatch.setattr(thread, "_post", lambda what: None)
    monkeypatch.setattr(engine, "check", looked.append)
    prompts = [[1], [2]]

    async def work() -> None:
        async with thread.ask([Request(prompt, 9) for prompt in prompts for _ in range(3)]):
            pass

    asyncio.run(work())
    assert [request.prompt for request in looked] == prompts


def test_advice_to_come_again_is_the_pace_at_which_texts_end():
    thread = EngineThread(ScriptedEngine(), 1)
    assert thread.patience(5) == 1
    for ended, count, expected in (([0, 2, 4, 6], 3, 6), ([0, 0.01], 1, 1), ([0, 1e4], 1, 60)):
        thread._ended.clear()
        thread._ended.extend(ended)
        assert thread.patience(count) == expected


def test_what_is_seen_of_the_engine_is_seen_between_two_turns():
    engine = ScriptedEngine(gate=threading.Semaphore(0), seconds=0)
    thread = EngineThread(engine, 1)

    async def work() -> None:
        async with thread.ask([Request([1], 50)]):
            await asyncio.to_thread(until, lambda: engine.turns == 1)
            looking = asyncio.ensure_future(thread.look(lambda seen: seen.statistics.written))
            await asyncio.sleep(0.05)
            assert not looking.done()
            engine.gate.release()
            assert await looking == 1
            engine.gate.release()

    within(thread, work)


def test_a_failure_reaches_all_that_wait():
    engine = ScriptedEngine(gate=threading.Semaphore(0), fails_at=2)
    thread = EngineThread(engine, 8)

    async def work() -> None:
        async with (
            thread.ask([Request([1], 50)]) as first,
            thread.ask([Request([2], 50)]) as second,
        ):
            await asyncio.to_thread(until, lambda: engine.turns == 1)
            looks = asyncio.ensure_future(thread.look(lambda seen: 1 / 0))
            engine.gate.release()
            for asked in (first, second):
                with pytest.raises(Refusal, match="the engine has failed"):
                    async for _ in thread.answers(asked):
                        pass
            with pytest.raises(Refusal, match="the engine has failed"):
                await looks
        with pytest.raises(Refusal, match="the engine has failed"):
            await thread.look(lambda seen: 0)

    within(thread, work)
    assert isinstance(thread.failure, ArithmeticError)
