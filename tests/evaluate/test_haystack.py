"""The text around needles: whole documents in a circle; the library's held-out part, or a file."""

import json
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.data.documents import Document, content_hash
from dsv3_jax.data.held_out import is_held_out
from dsv3_jax.data.tokenizer import Tokenizer, train_tokenizer
from dsv3_jax.evaluate import haystack as module
from dsv3_jax.evaluate.haystack import Haystack, open_haystack


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["some text"], 262)


def decoded(tokenizer: Tokenizer, found: Haystack, document: int, count: int) -> str:
    return tokenizer.decode(found.stretch(document, count))


def test_documents_follow_each_other_in_a_circle(tokenizer):
    texts = ["one", "two and", "three"]
    found = Haystack("x", [Document(text, text) for text in texts], tokenizer)
    assert (found.documents, len(found)) == (3, 21)
    assert decoded(tokenizer, found, 0, 21) == "one\n\ntwo and\n\nthree\n\n"
    assert decoded(tokenizer, found, 1, 21) == "two and\n\nthree\n\none\n\n"
    assert decoded(tokenizer, found, 2, 4) == "thre"
    assert found.content_hash == content_hash([Document("", text) for text in texts])
    with pytest.raises(ValueError, match="--haystack x: 21 tokens, and 22 of text are needed"):
        found.stretch(0, 22)


def test_of_a_long_text_the_beginning_is_read(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "MOST_TOKENS", 10)

    def documents():
        yield Document("a", "a" * 5)
        yield Document("b", "b" * 5)
        raise AssertionError("the third document is not needed")

    found = Haystack("x", documents(), tokenizer)
    assert (found.documents, len(found)) == (2, 14)


def test_without_a_file_it_is_what_training_on_the_library_holds_out(tokenizer, monkeypatch):
    library = [Document(f"{i}.py", f"text {i}\n" * 9) for i in range(900)]
    held_out = [one for one in library if is_held_out(one.text, 0.02)]
    assert 1 < len(held_out) < 30
    monkeypatch.setattr(module, "iterate_documents", lambda source: iter(library))
    found = open_haystack(None, tokenizer, 100)
    assert found.name == "stdlib, held-out documents"
    assert found.content_hash == content_hash(held_out)
    more = open_haystack(None, tokenizer, len(found) + 1)
    assert more.name == "stdlib, held-out documents first"
    assert more.documents == 900
    np.testing.assert_array_equal(more.stretch(0, len(found)), found.stretch(0, len(found)))


def test_a_users_file_is_text_or_json_lines(tokenizer, tmp_path: Path):
    (tmp_path / "a.txt").write_text("größer")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in "ab"))
    text = open_haystack(tmp_path / "a.txt", tokenizer, 4)
    assert decoded(tokenizer, text, 0, len(text)) == "größer\n\n"
    lines = open_haystack(tmp_path / "a.jsonl", tokenizer, 4)
    assert decoded(tokenizer, lines, 1, len(lines)) == "b\n\na\n\n"
    assert lines.name == str(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gone.txt", None, "no file matches"),
        ("latin.txt", b"ab\xff", "is not utf-8 text: byte 0xff at offset 2"),
        ("empty.txt", b"", "no text in 1 files"),
        ("bad.jsonl", b"{", "bad.jsonl line 1 is no JSON"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_as_the_option(
    name, content, said, tokenizer, tmp_path: Path
):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as told:
        open_haystack(tmp_path / name, tokenizer, 4)
    assert str(told.value).startswith("--haystack")
    assert "data.source" not in str(told.value)
