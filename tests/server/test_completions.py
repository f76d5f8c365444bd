"""Texts as clients get them: whole and in pieces, with log-probabilities, ended as they asked."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest

from dsv3_jax.data.chat import ChatTemplate
from dsv3_jax.inference.requests import Answer, Scores
from dsv3_jax.server.choices import Choice
from tests.server.clients import ask, events
from tests.server.scripted import END, LOGPROB, TOKENIZER, ScriptedEngine, saying, service_of
from tests.server.serving import serving

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
BOS = "<｜begin▁of▁sentence｜>"


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    with serving(service_of(ScriptedEngine(saying("0 1 2€3 END x")))) as found:
        yield found


def test_a_completion_is_what_openai_documents(base):
    found = ask(base, COMPLETIONS, {"model": "scripted", "prompt": "ab", "max_tokens": 3}).json()
    assert found.pop("id").startswith("cmpl-")
    assert found.pop("created") > 1.7e9
    assert found == {
        "object": "text_completion",
        "model": "scripted",
        "choices": [{"index": 0, "text": "0 1", "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6},
    }


def test_a_chat_is_what_openai_documents(base):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}
    ]
    found = ask(base, CHATS, {"messages": messages}).json()
    assert found["object"] == "chat.completion"
    (choice,) = found["choices"]
    message = {"role": "assistant", "content": "0 1 2€3 END x", "refusal": None}
    assert choice == {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    prompt = [*TOKENIZER.encode("<｜User｜>hi<｜Assistant｜>"), 0]
    assert found["usage"]["prompt_tokens"] == len(prompt)


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("END", "0 1 2€3 "),
        (["zz", "€"], "0 1 2"),
        (["1 2", "2"], "0 "),
        ("nowhere", "0 1 2€3 END x"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_text_ends_before_a_stop_string(base, stop, text, stream):
    body = {"prompt": "a", "max_tokens": 99, "stop": stop, "stream": stream}
    reply = ask(base, COMPLETIONS, body)
    pieces = list(events(reply.body)) if stream else [reply.json()]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == text
    assert pieces[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_stream_has_whole_characters_one_end_and_the_usage_that_was_asked_for(base):
    body = {
        "prompt": "a",
        "max_tokens": 99,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    reply = ask(base, COMPLETIONS, body)
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    *pieces, last = events(reply.body)
    texts = [piece["choices"][0]["text"] for piece in pieces]
    assert "€" in texts
    assert "".join(texts) == "0 1 2€3 END x"
    assert [p["choices"][0]["finish_reason"] for p in pieces] == [None] * (len(pieces) - 1) + [
        "stop"
    ]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len("0 1 2€3 END x".encode())
    assert len({piece["id"] for piece in (*pieces, last)}) == 1


def test_a_chats_stream_names_the_speaker_once(base):
    body = {"messages": [{"role": "user", "content": "a"}], "stream": True, "n": 2}
    deltas = [piece["choices"][0] for piece in events(ask(base, CHATS, body).body)]
    for index in (0, 1):
        own = [one["delta"] for one in deltas if one["index"] == index]
        assert [one for one in own if "role" in one] == [own[0]]
        assert "".join(one["content"] for one in own) == "0 1 2€3 END x"


@pytest.mark.parametrize("wished", [True, False])
def test_who_wishes_for_usage_has_null_before_it(base, wished):
    body = {
        "messages": [{"role": "user", "content": "a"}],
        "stream": True,
        "stream_options": {"include_usage": wished},
    }
    pieces = list(events(ask(base, CHATS, body).body))
    if wished:
        *pieces, last = pieces
        assert last["usage"]["total_tokens"] > 0
    assert [piece.get("usage", "absent") for piece in pieces] == len(pieces) * [
        None if wished else "absent"
    ]


def test_a_text_may_be_wished_to_go_on_behind_its_end(base):
    body = {"prompt": "a", "max_tokens": 20, "ignore_eos": True, "repetition_penalty": 1.0}
    found = ask(base, COMPLETIONS, body).json()
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == 20


def test_several_prompts_and_several_choices_of_each_stand_in_order(base):
    body = {"prompt": ["a", "bc"], "n": 3, "max_tokens": 2, "best_of": 3}
    found = ask(base, COMPLETIONS, body).json()
    assert [one["index"] for one in found["choices"]] == [0, 1, 2, 3, 4, 5]
    assert found["usage"] == {"prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17}


def test_an_echo_has_the_prompt_with_what_is_known_of_its_tokens(base):
    body = {"prompt": "h€", "max_tokens": 2, "echo": True, "logprobs": 1}
    (choice,) = ask(base, COMPLETIONS, body).json()["choices"]
    assert choice["text"] == "h€0 "
    logs = choice["logprobs"]
    broken = ["\ufffd"] * 3  # a byte a token: no character of its own
    assert logs["tokens"] == [BOS, "h", *broken, "0", " "]
    assert logs["token_logprobs"] == [None] + 6 * [LOGPROB]
    assert logs["text_offset"] == [0, 0, 1, 1, 1, 2, 3]
    assert logs["top_logprobs"][0] is None
    assert logs["top_logprobs"][1] == {"h": LOGPROB}


def test_nothing_new_is_an_echo_alone(base):
    body = {"prompt": "hi", "max_tokens": 0, "echo": True, "logprobs": 0, "stream": True}
    (piece,) = events(ask(base, COMPLETIONS, body).body)
    (choice,) = piece["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hi", "length")
    assert choice["logprobs"]["tokens"] == [BOS, "h", "i"]


def test_a_chat_tells_of_tokens_with_their_bytes(base):
    body = {
        "messages": [{"role": "user", "content": "a"}],
        "logprobs": True,
        "top_logprobs": 2,
        "max_completion_tokens": 6,
    }
    (choice,) = ask(base, CHATS, body).json()["choices"]
    first, *_, last = choice["logprobs"]["content"]
    assert first["token"] == "0"
    assert first["bytes"] == [48]
    assert last["token"] == "\ufffd"
    assert last["bytes"] == [0xE2]  # the first byte of €, which is not whole
    assert choice["message"]["content"] == "0 1 2\ufffd"
    assert [one["logprob"] for one in first["top_logprobs"]] == [LOGPROB, -2.0]


def test_a_mark_has_no_bytes_and_an_id_beyond_the_vocabulary_is_one_character(base):
    """As it is in the text, so that what follows has its place."""
    answer = Answer(0, [END, 300, 7], 3 * [-1.0], 3 * [[]], "length")
    piece = Choice(TOKENIZER, [1], top=0).add(answer)
    assert [log.own.token for log in piece.logs[:2]] == [TOKENIZER.spelling_of(END), "\ufffd"]
    assert [log.offset for log in piece.logs] == [0, 0, 1]
    assert len(piece.text) == 2
    body = {
        "messages": [{"role": "user", "content": "a"}],
        "logprobs": True,
        "max_tokens": 16,
        "ignore_eos": True,
    }
    (choice,) = ask(base, CHATS, body).json()["choices"]
    content = choice["logprobs"]["content"]
    assert (content[-1]["token"], content[-1]["bytes"]) == (TOKENIZER.spelling_of(END), None)
    assert content[0]["bytes"] == [48]


def test_a_speakers_name_reaches_the_template():
    service = service_of(ScriptedEngine(saying("x")))
    named = "{% for m in messages %}{{ m.name or '-' }}: {{ m.content }};{% endfor %}"
    template = ChatTemplate(TOKENIZER, named)
    service = replace(service, jobs=replace(service.jobs, template=template))
    hi = {"role": "user", "content": "hi"}
    with serving(service) as base:
        found = ask(base, CHATS, {"messages": [hi | {"name": "ann"}, hi]}).json()
    assert found["usage"]["prompt_tokens"] == len("ann: hi;-: hi;")


def test_ids_are_a_prompt_too_and_have_nothing_before_them(base):
    ids = TOKENIZER.encode("hi").tolist()
    for prompt in (ids, [ids, ids]):
        body = {"prompt": prompt, "max_tokens": 1, "echo": True}
        found = ask(base, COMPLETIONS, body).json()
        assert [one["text"] for one in found["choices"]] == ["hi0"] * len(found["choices"])
        assert found["usage"]["prompt_tokens"] == 2 * len(found["choices"])


def test_seeds_decide_and_choices_differ():
    seen = []

    def noting(request):
        seen.append(request)
        return saying("x")(request)

    body = {"prompt": "a", "n": 2}
    with serving(service_of(ScriptedEngine(noting))) as base:
        for more in ({"seed": -1}, {"seed": 2**40 + 7}, {}, {}, {"temperature": 0, "top_p": 0.5}):
            assert ask(base, COMPLETIONS, body | more).status == 200
    seeds = [request.seed for request in seen]
    assert seeds[:4] == [2**32 - 1, 0, 7, 8]
    assert len({seeds[4], seeds[6]}) == 2
    assert (seen[0].temperature, seen[0].top_p, seen[0].max_tokens) == (1.0, 1.0, 16)
    assert (seen[8].temperature, seen[8].top_p) == (0, 0.5)


def test_tokens_behind_a_stop_string_count_for_nothing():
    """Drafts bring several at once."""
    tokens = TOKENIZER.encode("ab|cd").tolist()
    choice = Choice(TOKENIZER, [1], stops=["|"], top=0)
    piece = choice.add(Answer(0, tokens, [0.0] * 5, [[]] * 5))
    assert (piece.text, piece.finish, choice.written, len(piece.logs)) == ("ab", "stop", 3, 3)


def test_tokens_beyond_the_vocabulary_are_told_as_they_stand_in_the_text():
    """Models have room for more tokens than there are."""
    beyond = len(TOKENIZER.token_bytes)
    tokens = [beyond, *TOKENIZER.encode("é").tolist(), beyond + 5, *TOKENIZER.encode("b").tolist()]
    choice = Choice(TOKENIZER, [beyond, 9, beyond], top=1, echo=True)
    scores = Scores([0.0] * 2, [[]] * 2)
    answer = Answer(0, tokens, [0.0] * 5, [[(token, 0.0)] for token in tokens], "length", scores)
    piece = choice.add(answer)
    assert piece.text == TOKENIZER.decode([beyond, 9, beyond]) + "\ufffdé\ufffdb"
    offsets = [log.offset for log in piece.logs]
    assert offsets == [0, 1, 2, 3, 4, 4, 5, 6]
    assert [piece.text[log.offset] for log in piece.logs if len(log.own.token) == 1][-1] == "b"


def test_what_is_no_number_in_json_is_one_that_clients_know():
    answer = Answer(0, [7], [-math.inf], [[(7, -math.inf)]], "length")
    (log,) = Choice(TOKENIZER, [1], top=1).add(answer).logs
    assert log.own.logprob == log.top[0].logprob == -9999.0
