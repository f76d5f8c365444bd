"""Texts are told apart by their hashes, names do not count."""

import hashlib

from dsv3_jax.data.documents import Document, content_hash, text_hash


def test_the_order_of_texts_counts_and_their_names_do_not() -> None:
    documents = [Document("a", "1"), Document("b", "2")]
    renamed = [Document("c", "1"), Document("d", "2")]
    assert content_hash(documents) == content_hash(iter(renamed))
    assert content_hash(documents) != content_hash(documents[::-1])


def test_a_text_hash_is_the_start_of_its_sha256() -> None:
    assert f"{text_hash('é'):016x}" == hashlib.sha256("é".encode()).hexdigest()[:16]
