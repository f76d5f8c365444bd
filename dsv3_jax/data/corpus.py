"""From a `DataConfig` to rows: documents, split, tokenizer, tokens (report 4.1)."""

from collections.abc import Callable
from dataclasses import dataclass

from dsv3_jax.config import DataConfig
from dsv3_jax.data.packing import Rows, cached_tokenize
from dsv3_jax.data.sources import content_hash, load_documents, split_documents
from dsv3_jax.data.tokenizer import Tokenizer, cached_tokenizer, load_tokenizer


@dataclass(frozen=True, eq=False)
class Corpus:
    """Rows to train on, rows held out in the order of their documents, and their tokenizer."""

    tokenizer: Tokenizer
    train: Rows
    validation: Rows
    content_hash: str
    """Of all documents, both splits"""


def build_corpus(
    cfg: DataConfig,
    vocab_size: int,
    seed: int,
    say: Callable[[str], None],
    tokenizer: Tokenizer | None = None,
) -> Corpus:
    """Reads, splits and tokenises; each stage tells `say` what it found.

    A given `tokenizer` (a resumed run's own) stands in for the configured one. ValueError for bad
    data or tokenizer.
    """
    documents = load_documents(cfg.source)
    train, validation = split_documents(documents, cfg.validation_fraction)
    size = sum(len(document.text.encode()) for document in documents)
    say(
        f"data       {_name(cfg.source)}: {len(train):,} documents to train on, "
        f"{len(validation):,} held out, {size / 1e6:.1f} MB"
    )
    say("           tokenising (some ten seconds the first time, then from the cache)")
    if tokenizer is None and cfg.tokenizer == "train":
        tokenizer = cached_tokenizer([document.text for document in train], vocab_size)
    elif tokenizer is None:
        tokenizer = load_tokenizer(cfg.tokenizer)
    tokenised = [cached_tokenize(part, tokenizer, vocab_size) for part in (train, validation)]
    count = len(tokenised[0].tokens)
    say(
        f"tokens     {count / 1e6:.2f} M to train on, {len(tokenised[1].tokens) / 1e3:.0f} k held "
        f"out, vocabulary {tokenizer.vocab_size:,}"
    )
    return Corpus(
        tokenizer,
        Rows(tokenised[0], cfg.length, seed),
        Rows(tokenised[1], cfg.length),
        content_hash(documents),
    )


def _name(source: str | tuple[str, ...]) -> str:
    return source if isinstance(source, str) else " ".join(source)
