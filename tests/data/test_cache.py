"""The cache folder is where XDG says, keys tell texts apart."""

import logging
import os
from pathlib import Path

import pytest

from dsv3_jax.data.cache import hash_texts, store
from dsv3_jax.files import cache_folder


def test_folder_follows_xdg_then_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/dsv3_jax")
    assert cache_folder("mine") == Path("mine")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert cache_folder() == Path("/h/.cache/dsv3_jax")


def test_there_is_no_folder_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert cache_folder() is None


def test_hash_tells_sequences_of_texts_apart() -> None:
    sequences = [(), ("",), ("abc",), ("ab", "c"), ("a", "bc"), ("c", "ab"), ("ab", "c", "")]
    assert len({hash_texts(texts) for texts in sequences}) == len(sequences)


def test_an_unwritable_cache_is_one_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        store(tmp_path / "file" / "tokens" / "key", b"data")
    (message,) = caplog.messages
    assert str(tmp_path) in message
    assert "\n" not in message
