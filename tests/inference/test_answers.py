"""Texts come whole and in order, whatever the turns in which an engine answers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from dsv3_jax.inference.answers import Written, line_of, texts_of
from dsv3_jax.inference.prompt_file import Prompt, Wishes
from dsv3_jax.inference.requests import Answer, Request

TABLE = [bytes([i]) for i in range(256)]


@dataclass
class Scripted:
    """An engine that answers each prompt as its text says: turns apart by a space, the end of the
    text by a dot; what is no ASCII cannot be served.
    """

    settings: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(rows=2))
    programs: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(shards=1))
    going: dict[int, list[str]] = field(default_factory=dict)
    cancelled: list[int] = field(default_factory=list)
    most: int = 0
    count: int = 0

    @property
    def pending(self) -> int:
        return len(self.going)

    def submit(self, request: Request) -> int:
        text = bytes(request.prompt).decode()
        if not text.isascii():
            raise ValueError("not ASCII")
        self.count += 1
        self.going[self.count] = text.split()
        self.most = max(self.most, self.pending)
        return self.count

    def cancel(self, number: int) -> bool:
        there = self.going.pop(number, None) is not None
        if there:
            self.cancelled.append(number)
        return there

    def turn(self) -> list[Answer]:
        answers = []
        for number, turns in [*self.going.items()]:
            tokens = list(turns.pop(0).encode())
            ended = None if turns else "stop" if tokens[-1] == ord(".") else "length"
            if ended:
                del self.going[number]
            answers.append(Answer(number, tokens, [-float(t) for t in tokens], ended=ended))
        return answers


def ask(text: str, max_tokens: int = 99, stop: Sequence[str] = ()) -> tuple[Prompt, Request]:
    wishes = Wishes(max_tokens, stop=tuple(stop))
    return Prompt(text, wishes, {}), Request(text.encode(), max_tokens)


def test_texts_come_in_the_order_of_their_prompts_and_no_more_are_asked_for_than_there_are_rows():
    engine, told = Scripted(), []
    asks = [ask("a b c d."), ask("e."), ask("é"), ask("f g."), ask(""), ask("h.")]
    found = [*texts_of(engine, asks, TABLE, told.append)]
    assert [getattr(one, "text", None) for one in found] == ["abcd", "e", None, "fg", None, "h"]
    assert [str(one) for one in found if isinstance(one, ValueError)] == [
        "not ASCII",
        "the prompt is empty; allowed: one character or more",
    ]
    assert engine.most == 2
    assert told == [1, 2, 3, 6]


def test_a_text_ends_where_its_end_token_its_stop_string_or_its_length_is():
    engine = Scripted()
    asks = [
        ask("ab c."),
        ask("ab cd e", stop=["xx", "bc"]),
        ask("abc", max_tokens=3),
        ask("abc", max_tokens=4),
        ask("ab", max_tokens=2, stop=["bx"]),  # held back to the end
        ask("."),
    ]
    found = [*texts_of(engine, asks, TABLE)]
    assert [(one.text, len(one.logprobs), one.ended) for one in found] == [
        ("abc", 3, "end"),
        ("a", 3, "stop"),
        ("abc", 3, "max_tokens"),
        ("abc", 3, "max_length"),
        ("ab", 2, "max_tokens"),
        ("", 0, "end"),
    ]
    assert found[1].logprobs == [-97.0, -98.0, -99.0]
    assert engine.cancelled == [2]


def test_a_line_is_ascii_json_with_what_the_prompt_carried():
    prompt, request = Prompt("p", Wishes(9), {"id": ["é"]}), Request([1, 2], 9)
    text = Written("€\n\x9b", [-0.1, -2.0, float("-inf")], "stop")
    line = line_of(3, (prompt, request), text, logprobs=True)
    assert line.isascii()
    assert line.count("\n") == 1
    assert json.loads(line) == {
        "index": 3,
        "id": ["é"],
        "text": "€\n\x9b",
        "prompt_tokens": 2,
        "tokens": 3,
        "ended": "stop",
        "logprob": None,
        "logprobs": [-0.1, -2.0, None],
    }
    assert "logprob" not in line_of(3, (prompt, request), text, logprobs=False)
    failed = line_of(3, (prompt, request), ValueError("too long"), logprobs=True)
    assert json.loads(failed) == {"index": 3, "id": ["é"], "error": "too long"}
