"""Contamination as a slow look at every run of words finds it."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.posttrain.contamination import EvaluationTexts, read_evaluation_texts

WORDS = st.lists(st.sampled_from("abc"), max_size=9)


def slow(exam, size, prompt, answer):
    """Whether an exam text shows: a run of it within, or a short one that is the prompt."""
    for text in exam:
        if text and len(text) < size and text == prompt:
            return True
        runs = [text[i : i + size] for i in range(len(text) - size + 1)]
        for found in (prompt, answer):
            if any(found[i : i + size] in runs for i in range(len(found) - size + 1)):
                return True
    return False


@settings(max_examples=100, deadline=None)
@given(st.lists(WORDS, max_size=4), st.integers(1, 5), WORDS, WORDS)
def test_a_sample_is_contaminated_exactly_if_a_run_of_words_is_there(exam, size, prompt, answer):
    named = ((str(i), " ".join(text)) for i, text in enumerate(exam))
    texts = EvaluationTexts(named, size)
    found = texts.within(" ".join(prompt), [" ".join(answer)])
    assert (found is not None) == slow(exam, size, prompt, answer)


def test_punctuation_case_and_width_do_not_hide_a_text():
    texts = EvaluationTexts([("q1", "The quick, brown fox jumps.")], 4)
    assert texts.within("x", ["... THE QUICK\nbrown-fox!"]) == "q1"
    assert texts.within("quick brown fox", []) is None


def test_short_texts_count_as_whole_prompts_alone():
    texts = EvaluationTexts([("q", "Who wrote Hamlet?"), ("a", "42")], 13)
    assert texts.within("who wrote hamlet", []) == "q"
    assert texts.within("Who wrote Hamlet and why?", ["It is 42."]) is None


def test_files_are_read_line_by_line_and_by_paragraph(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"q": "one", "more": {"c": ["two", 3]}}\n\n["four"]\n')
    (tmp_path / "b.txt").write_text("five\nsix\n\nseven\n")
    found = list(read_evaluation_texts([tmp_path / "a.jsonl", tmp_path / "b.txt"]))
    assert [text for _, text in found] == [
        *("one", "two", "four", "five", "six", "five six", "seven", "seven"),
    ]
    assert found[2][0].endswith("a.jsonl line 3")
    assert found[3][0].endswith("b.txt line 1")


@pytest.mark.parametrize(
    ("line", "said"), [(b"{", "no JSON"), (b'{"a": 1, "a": 2}', "twice"), (b"\xff", "not UTF-8")]
)
def test_a_file_that_cannot_be_read_is_told_with_its_line(tmp_path: Path, line: bytes, said: str):
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" + line)
    with pytest.raises(ValueError, match=r"a\.jsonl line 2: ") as failed:
        list(read_evaluation_texts([tmp_path / "a.jsonl"]))
    assert said in str(failed.value)
    with pytest.raises(OSError, match="No such file"):
        list(read_evaluation_texts([tmp_path / "gone"]))
