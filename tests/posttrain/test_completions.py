"""Reasoning is told from the answer, and put in front of it again."""

import pytest

from dsv3_jax.posttrain.completions import Completion, with_reasoning, without_reasoning


@pytest.mark.parametrize(
    ("text", "answer", "reasoning"),
    [
        ("plain", "plain", None),
        ("<think>\na\n</think>\n\nb", "b", "a"),
        ("a\n</think>\nb", "b", "a"),
        ("<think>endless", "", "endless"),
        ("<think></think>b", "b", ""),
        ("b <think>", "b <think>", None),
        ("a</think>b</think>c", "b</think>c", "a"),
    ],
)
def test_the_answer_is_what_follows_the_reasoning(text: str, answer: str, reasoning: str | None):
    assert without_reasoning(text) == (answer, reasoning)


def test_the_two_are_put_together_as_they_came():
    text = "<think>\na\n</think>\n\nb"
    assert with_reasoning(Completion(*without_reasoning(text))) == text
    assert with_reasoning(Completion("b")) == "b"
