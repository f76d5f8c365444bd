"""Answers over HTTP, from our own server as from others: retries for what passes, a failure for
what one prompt is to blame for, one line for the rest.
"""

import json
import threading
import time
from typing import Any

import pytest

from dsv3_jax.posttrain import served_model
from dsv3_jax.posttrain.completions import Ask, Completion, Failure, Unavailable
from dsv3_jax.posttrain.served_model import ServedModel, Server
from dsv3_jax.posttrain.synthesis_options import Sampling
from tests.posttrain.scripted_models import chat, problem, scripted_server
from tests.server.scripted import ScriptedEngine, saying, service_of
from tests.server.serving import serving

SAMPLING = Sampling(temperature=0.5, top_p=0.9, max_tokens=20, stop=("END",))


def asks(count: int) -> list[Ask]:
    return [Ask(problem(id=str(n)), n, 100 + n) for n in range(count)]


def model(url: str, **changes: Any) -> ServedModel:
    fields = {"model": "scripted", "pause": 0.001, "retries": 3, "seconds": 10.0}
    return ServedModel(Server(url, **fields | changes), SAMPLING)


def answers(url: str, count: int = 1, **changes: Any) -> list[Completion | Failure]:
    found = {ask.number: answer for ask, answer in model(url, **changes).answers(asks(count))}
    return [found[number] for number in range(count)]


def test_our_own_server_answers():
    with serving(service_of(ScriptedEngine(saying("It is 2. END no")))) as url:
        assert answers(url, 5) == [Completion("It is 2. ", None, False, 12)] * 5
        assert answers(f"{url}/v1/", 1)[0].text == "It is 2. "
    with serving(service_of(ScriptedEngine())) as url:  # counts without end
        (found,) = answers(url)
        assert found.cut
        assert found.tokens == 20


def test_a_request_holds_all_that_decides_the_answer():
    with scripted_server(lambda number, body: (200, chat("2"))) as (url, asked):
        answers(url, 1, key="secret")
    (body,) = asked
    assert body["path"] == "/v1/chat/completions"
    assert body["headers"]["Authorization"] == "Bearer secret"
    wanted = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 20, "seed": 100, "stop": ["END"]}
    wanted |= {"model": "scripted", "messages": problem().messages}
    assert {name: body[name] for name in wanted} == wanted


def test_no_more_requests_are_on_their_way_than_wished():
    lock, now, most = threading.Lock(), [0], [0]
    gate = threading.Barrier(3)

    def answer(number: int, body: dict) -> tuple[int, Any]:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        gate.wait(30)  # passes three at a time: fewer would wait for ever
        with lock:
            now[0] -= 1
        return 200, chat(str(body["seed"]))

    with scripted_server(answer) as (url, _):
        found = answers(url, 9, concurrency=3)
    assert [one.text for one in found] == [str(100 + n) for n in range(9)]
    assert most[0] == 3


@pytest.mark.parametrize(
    "passing",
    [
        (0, b""),
        (408, {}),
        (429, {"error": {"message": "slowly"}}),
        (500, b"\xff"),
        (503, {}),
        (200, b"no JSON"),
        (200, {}),
        (200, []),
        (200, {"choices": []}),
        (200, {"choices": [{"message": {"content": 3}, "finish_reason": "stop"}]}),
    ],
)
def test_what_may_pass_is_tried_again(passing: tuple[int, Any]):
    with scripted_server(lambda n, _: passing if n < 2 else (200, chat("2"))) as (url, asked):
        assert answers(url) == [Completion("2", None, False, 3)]
    assert len(asked) == 3
    assert {body["seed"] for body in asked} == {100}


def test_pauses_grow_and_heed_the_server(monkeypatch: pytest.MonkeyPatch):
    pauses: list[float] = []
    with scripted_server(lambda n, _: (429 if n else 500, {})) as (url, _):
        leaving = threading.Event()
        monkeypatch.setattr(leaving, "wait", lambda seconds: pauses.append(seconds))
        monkeypatch.setattr(served_model, "_seconds", lambda header: 7.0 if header else 0.0)
        with pytest.raises(Unavailable, match=r"answered 429 .*; tried 9 times"):
            model(url, pause=1.0).asked("/chat/completions", {}, str, 8, leaving)
    assert 0.5 <= pauses[0] <= 1.0
    assert pauses[1:3] == [7.0, 7.0]  # the header's, above 2 and 4 s
    assert pauses[7] == served_model.LONGEST_PAUSE
    assert len(pauses) == 8


@pytest.mark.parametrize("status", [400, 413, 422])
def test_one_prompts_own_fault_is_its_failure(status: int):
    said = {"error": {"message": "the prompt\nis too long \ud800"}}

    def answer(_: int, body: dict) -> tuple[int, Any]:
        return (status, json.dumps(said).encode()) if body["seed"] == 101 else (200, chat("2"))

    with scripted_server(answer) as (url, asked):
        found = answers(url, 3)
    assert found[1] == Failure(f"answered {status} the prompt is too long \ufffd")
    assert [one.text for one in (found[0], found[2])] == ["2", "2"]
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "answered 401 no key"),
        (403, "answered 403 no key"),
        (404, "answered 404 no key"),
        (302, "answered 302 no key"),
        (500, "answered 500 no key; tried 4 times"),
    ],
)
def test_all_else_ends_the_work_in_one_line(status: int, said: str):
    with scripted_server(lambda *_: (status, {"error": {"message": "no key"}})) as (url, asked):
        with pytest.raises(Unavailable) as failed:
            answers(url, 1, key="secret")
        assert str(failed.value) == f"--server {url}: {said}"
        assert len(asked) == (4 if status == 500 else 1)
        assert all(body["path"] == "/v1/chat/completions" for body in asked)


def test_answers_before_the_end_are_handed_out():
    end = threading.Event()

    def answer(_: int, body: dict) -> tuple[int, Any]:
        if body["seed"] > 103:  # what is there is handed out before a failure
            end.wait(30)
        return (403, {}) if body["seed"] == 103 else (200, chat("2"))

    with scripted_server(answer) as (url, _):
        coming = model(url, concurrency=1).answers(asks(9))
        assert [next(coming)[0].number for _ in range(3)] == [0, 1, 2]
        with pytest.raises(Unavailable):
            next(coming)
        end.set()


def test_trouble_that_may_pass_is_told_once_in_a_while(capsys):
    with scripted_server(lambda n, _: (503 if n < 3 else 200, chat("2"))) as (url, _):
        answers(url)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"--server {url}: answered 503 Service Unavailable; again in 0 s"


def test_answers_that_are_there_when_one_fails_are_handed_out_first():
    fail, go_on, end = threading.Event(), threading.Event(), threading.Event()
    waits = {100: fail, 102: go_on, 103: end, 104: end}

    def answer(_: int, body: dict) -> tuple[int, Any]:
        assert body["seed"] == 101 or waits[body["seed"]].wait(30)
        return (403, {}) if body["seed"] == 100 else (200, chat("2"))

    with scripted_server(answer) as (url, asked):
        coming = model(url, concurrency=2).answers(asks(6))
        assert next(coming)[0].number == 1
        fail.set()
        time.sleep(0.1)
        go_on.set()
        while len(asked) < 5:  # both threads are at their last
            time.sleep(0.01)
        assert next(coming)[0].number == 2  # behind the failure in the queue
        with pytest.raises(Unavailable, match="403"):
            next(coming)
        end.set()


def test_calls_that_were_given_up_ask_no_more_and_none_goes_beyond_the_concurrency():
    silent = threading.Event()
    with scripted_server(lambda *_: (silent.wait(30), (503, {}))[1]) as (url, asked):
        asking = model(url, concurrency=2, retries=100, seconds=60.0)
        calls = [asking.answers(asks(9)) for _ in range(3)]
        waiting = [threading.Thread(target=list, args=(call,)) for call in calls]
        for thread in waiting:
            thread.start()
        while len(asked) < 2:
            time.sleep(0.01)
        time.sleep(0.1)
        for call, thread in zip(calls, waiting, strict=True):
            call.close()  # from another thread than the one that waits
            thread.join(30)
            assert not thread.is_alive()
        silent.set()
        time.sleep(0.2)
        assert len(asked) == 2


def test_a_server_that_is_not_there_or_silent_is_told():
    with scripted_server(lambda *_: (200, chat("2"))) as (url, _):
        pass
    with pytest.raises(Unavailable, match=r"cannot be reached: Connection refused; tried once$"):
        model(url, retries=0)
    silent = threading.Event()
    with scripted_server(lambda *_: (silent.wait(30), (200, chat("2")))[1]) as (url, _):
        with pytest.raises(Unavailable, match=r"no answer in time \(--timeout\); tried 2 times$"):
            answers(url, 1, seconds=0.1, retries=1)
        silent.set()


def test_the_model_must_be_served_if_the_server_says_what_is():
    with (
        scripted_server(lambda *_: (200, chat("2")), models=("a", "b\ud800")) as (url, _),
        pytest.raises(Unavailable, match=r"--model 'scripted' is not served; allowed: a, b\ufffd$"),
    ):
        model(url)
    with scripted_server(lambda *_: (200, chat("2")), models=None) as (url, _):
        assert answers(url)[0].text == "2"


@pytest.mark.parametrize(
    ("found", "completion"),
    [
        (chat("b", reasoning_content="a"), Completion("b", "a", False, 3)),
        (chat("b", reasoning="a"), Completion("b", "a", False, 3)),
        (chat("<think>a</think>b"), Completion("b", "a", False, 3)),
        (chat(None, finish="length"), Completion("", None, True, 3)),
        (chat("b\ud800"), Completion("b\ufffd", None, False, 3)),
        ({"choices": chat("b")["choices"]}, Completion("b", None, False, None)),
    ],
)
def test_answers_of_several_servers_are_understood(found: Any, completion: Completion):
    with scripted_server(lambda *_: (200, json.dumps(found).encode())) as (url, _):
        assert answers(url) == [completion]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"url": "localhost:8000"}, "--server is 'localhost:8000'; allowed: http://host:port"),
        ({"url": "ftp://a"}, "--server is 'ftp://a'"),
        ({"url": "http://"}, "--server is 'http://'"),
        ({"url": "http://a:x"}, "--server is 'http://a:x'"),
        ({"url": "http://me:secret@a"}, "--server is "),
        ({"concurrency": 0}, "--concurrency is 0; allowed: 1 to 1024"),
        ({"seconds": 0}, "--timeout is 0; allowed: above 0"),
        ({"retries": -1}, "--retries is -1; allowed: 0 to 100"),
    ],
)
def test_options_that_cannot_be_are_told(changes: dict[str, Any], said: str):
    with pytest.raises(ValueError, match="allowed") as failed:
        Server(**{"url": "http://a", "model": "m"} | changes).check()
    assert said in str(failed.value)
