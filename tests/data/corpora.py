"""Small corpora that several test modules use."""

import numpy as np

from dsv3_jax.data.documents import Document
from dsv3_jax.data.held_out import survey
from dsv3_jax.data.tokenised import TokenizedCorpus

DOCUMENTS = [
    Document("code", "def f(x):\r\n\treturn x + 1\n"),
    Document("han", "你好，世界 👩‍👩‍👧‍👦"),
    Document("one", "x"),
    Document("control", "\x00\x1b<｜end▁of▁sentence｜>"),
    Document("long", "some words and 12345 numbers\n" * 20),
    Document("one again", "x"),
]
EOS = 1


def corpus_of(*lengths: int) -> TokenizedCorpus:
    """Documents of these numbers of tokens, which all differ but for the eos that ends each."""
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    tokens = np.arange(offsets[-1], dtype=np.int32) + 10
    tokens[offsets[1:] - 1] = EOS
    return TokenizedCorpus(tokens, offsets)


def split_documents(
    documents: list[Document], fraction: float
) -> tuple[list[Document], list[Document]]:
    """(training, validation), each in the order of `documents`, neither empty; see `survey`."""
    divided = list(survey(documents, fraction).divide(documents))
    train = [document for document, held_out in divided if not held_out]
    return train, [document for document, held_out in divided if held_out]
