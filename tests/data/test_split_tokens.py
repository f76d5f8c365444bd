"""Joined tokens are split at their rate, by the text alone, and no byte changes."""

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from dsv3_jax.data.documents import text_hash
from dsv3_jax.data.hashing import unit, words
from dsv3_jax.data.split_tokens import TokenSplitter
from dsv3_jax.data.tokenizer import Tokenizer, train_tokenizer

CODE = "def f(x):\n    return {\n        'a': x,\r\n        'b': (x,\n\n),\n    }\n"


@pytest.fixture(scope="module")
def joining() -> Tokenizer:
    """With ten joined tokens."""
    return train_tokenizer([CODE * 3], vocab_size=320)


def slowly(splitter: TokenSplitter, text: str, ids: list[int]) -> list[int]:
    """The definition: one occurrence after the other."""
    found, occurrence = [], 0
    for token in ids:
        if token not in splitter.halves:
            found.append(token)
            continue
        word = words(text_hash(text), occurrence + 1)[occurrence]
        split = float(unit(word)) < splitter.rate
        found += splitter.halves[token].tolist() if split else [token]
        occurrence += 1
    return found


def test_joined_tokens_are_punctuation_and_line_ends(joining: Tokenizer) -> None:
    found = TokenSplitter(joining, 1.0).halves
    joined = {joining.token_bytes[i] for i in found}
    lf = {b",\n", b",\n\n", b"),\n", b"):\n", b"{\n", b"}\n", b" {\n", b" }\n"}
    assert joined == lf | {b",\r", b",\r\n"}
    for token, ids in found.items():
        pieces = [joining.token_bytes[i] for i in ids.tolist()]
        assert b"".join(pieces) == joining.token_bytes[token]
        assert len(pieces) >= 2
        assert not any(piece.strip(b"\r\n") and piece[-1] in b"\r\n" for piece in pieces)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.text(st.sampled_from(":,x \n\r'({")), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_splitting_is_the_slow_definition_and_keeps_every_byte(text: str, rate: float) -> None:
    tokenizer = train_tokenizer([CODE * 3], vocab_size=320)
    splitter = TokenSplitter(tokenizer, rate)
    ids = tokenizer.encode(text)
    found = splitter.split(text, ids)
    assert found.dtype == np.int32
    assert found.tolist() == slowly(splitter, text, ids.tolist())
    assert tokenizer.decode(found.tolist()) == text
    if rate == 0:
        np.testing.assert_array_equal(found, ids)


def test_the_rate_is_the_share_that_is_split(joining: Tokenizer) -> None:
    splitter = TokenSplitter(joining, 0.3)
    text = "{x,\n" * 3000
    ids = joining.encode(text)
    splits = len(splitter.split(text, ids)) - len(ids)
    assert abs(splits / 3000 - 0.3) < 0.03


def test_another_text_splits_elsewhere(joining: Tokenizer) -> None:
    splitter = TokenSplitter(joining, 0.5)
    texts = ["x,\n" * 40, "x,\n" * 40 + "y"]
    found = [splitter.split(text, joining.encode(text))[:50].tolist() for text in texts]
    assert found[0] != found[1]


def test_a_vocabulary_without_joined_tokens_stays_as_it_is() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        models.BPE({t: i for i, t in enumerate(["</s>", *alphabet])}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    splitter = TokenSplitter(Tokenizer(backend, "bytes"), 1.0)
    ids = np.arange(1, 200, dtype=np.int32)
    np.testing.assert_array_equal(splitter.split("any", ids), ids)
