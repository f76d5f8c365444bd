"""One small trained tokenizer for all data tests, and no test that writes to the user's cache."""

from pathlib import Path

import pytest

from dsv3_jax.data.tokenizer import Tokenizer, train_tokenizer

SAMPLE = """def words(path: str) -> list[str]:
    \"\"\"Every word of a file; 12345 lines take 0.01 seconds.\"\"\"
    with open(path) as lines:
        return [word for line in lines for word in line.split()]


class Words:
    def __init__(self, path):
        self.words = words(path)  # 你好，世界 こんにちは カタカナ héllo
        self.path = path

    def __len__(self):
        return len(self.words)
"""


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """320 ids: 6 special tokens, 256 bytes, 58 merges."""
    return train_tokenizer([SAMPLE] * 3, vocab_size=320)


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, empty and for one test."""
    folder = tmp_path / "cache-home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder
