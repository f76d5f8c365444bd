"""~ is a home folder wherever users name files; that of nobody is one line."""

import re
from pathlib import Path

import pytest

from dsv3_jax.config import DataConfig
from dsv3_jax.data.conversations import read_conversations
from dsv3_jax.data.corpus import build_corpus
from dsv3_jax.data.paths import user_path
from dsv3_jax.data.sample_corpus import template_of
from dsv3_jax.data.sources import load_documents
from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer

NOBODYS = "~nosuchuser/a.jsonl"


def test_a_home_folder_stands_for_its_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somebody")
    assert user_path("~/a.txt", "--source") == Path("/somebody/a.txt")
    assert user_path("b/~/a.txt", "--source") == Path("b/~/a.txt")


def test_the_home_of_nobody_is_told() -> None:
    expected = (
        "--source ~nosuchuser/a: no home folder is known for ~nosuchuser; allowed: ~ or ~user of "
        "this machine, or './~nosuchuser' for a file of that name"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        user_path("~nosuchuser/a", "--source")


def test_every_path_of_the_data_is_a_users(tokenizer: Tokenizer) -> None:
    cfg = DataConfig(source=NOBODYS)
    chat = DataConfig(format="messages", isolate=True, source=NOBODYS, chat_template=NOBODYS)
    for read, field in (
        (lambda: load_documents(NOBODYS), "data.source"),
        (lambda: list(read_conversations(NOBODYS)), "data.source"),
        (lambda: build_corpus(cfg, 320, 0, print), "data.source"),
        (lambda: template_of(chat, tokenizer, None), "data.chat_template"),
        (lambda: load_tokenizer(NOBODYS), "tokenizer"),
        (lambda: load_tokenizer("~nosuchuser/tiktoken.model"), "tokenizer"),
    ):
        with pytest.raises(ValueError, match=rf"^{field} ~nosuchuser/\S*: no home folder is known"):
            read()


def test_a_tokenizer_lies_in_a_home_folder(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tokenizer.save(tmp_path / "mine.json")
    found = load_tokenizer("~/mine.json")
    assert found.content_hash == tokenizer.content_hash
    assert found.name == str(tmp_path / "mine.json")
