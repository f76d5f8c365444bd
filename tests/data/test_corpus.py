"""From a `DataConfig` to rows: both splits, the tokenizer of the training split alone, and what is
said about them.
"""

import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.config import DataConfig
from dsv3_jax.data.corpus import Corpus, build_corpus
from dsv3_jax.data.sources import content_hash, load_documents, split_documents
from dsv3_jax.data.tokenizer import Tokenizer, train_tokenizer

VOCAB, LENGTH, SEED = 300, 16, 5


@pytest.fixture
def cfg(tmp_path: Path) -> DataConfig:
    (tmp_path / "text").mkdir()
    for part in range(5):
        lines = [f"def f{i}(x):\n    return x + {i * part}\n" for i in range(30)]
        (tmp_path / "text" / f"{part}.py").write_text("".join(lines))
    source = str(tmp_path / "text" / "*.py")
    return DataConfig(source=source, validation_fraction=0.3, length=LENGTH)


def build(cfg: DataConfig, vocab_size: int = VOCAB, seed: int = SEED) -> tuple[Corpus, list[str]]:
    said: list[str] = []
    return build_corpus(cfg, vocab_size, seed, said.append), said


def test_both_splits_are_tokenised_whole_and_apart(cfg: DataConfig):
    corpus, _ = build(cfg)
    documents = load_documents(cfg.source)
    splits = split_documents(documents, cfg.validation_fraction)
    for rows, split in zip((corpus.train, corpus.validation), splits, strict=True):
        offsets = rows.corpus.offsets
        pieces = [rows.corpus.tokens[a:b] for a, b in pairwise(offsets)]
        texts = [corpus.tokenizer.decode(ids[1:-1].tolist()) for ids in pieces]  # no bos, no eos
        assert texts == [document.text for document in split]
    assert corpus.content_hash == content_hash(documents)


def test_the_tokenizer_has_seen_the_training_split_alone(cfg: DataConfig):
    corpus, _ = build(cfg)
    train, validation = split_documents(load_documents(cfg.source), cfg.validation_fraction)
    own = train_tokenizer([document.text for document in train], VOCAB)
    both = train_tokenizer([document.text for document in [*train, *validation]], VOCAB)
    assert corpus.tokenizer.content_hash == own.content_hash
    assert own.content_hash != both.content_hash


def test_training_rows_are_shuffled_by_the_seed_and_validation_rows_keep_their_order(
    cfg: DataConfig,
):
    corpus, _ = build(cfg)
    assert (corpus.train.length, corpus.train.seed) == (LENGTH, SEED)
    assert (corpus.validation.length, corpus.validation.seed) == (LENGTH, None)
    again, other = build(cfg)[0], build(cfg, seed=SEED + 1)[0]
    train = [np.stack([c.train[i].tokens_T for i in range(6)]) for c in (corpus, again, other)]
    assert np.array_equal(train[0], train[1])
    assert not np.array_equal(train[0], train[2])
    held_out = [np.stack([row.labels_T for row in c.validation]) for c in (corpus, other)]
    assert np.array_equal(held_out[0], held_out[1])
    labels = held_out[0][held_out[0] >= 0]
    assert np.array_equal(labels, corpus.validation.corpus.tokens)


def test_a_given_tokenizer_is_used_as_it_is(cfg: DataConfig, tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path / "tokenizer.json")
    given = replace(cfg, tokenizer=str(tmp_path / "tokenizer.json"))
    corpus, _ = build(given, vocab_size=tokenizer.vocab_size)
    assert corpus.tokenizer.content_hash == tokenizer.content_hash
    with pytest.raises(
        ValueError, match=f"has {tokenizer.vocab_size} ids; model.vocab_size is 319"
    ):
        build(given, vocab_size=tokenizer.vocab_size - 1)


def test_a_kept_tokenizer_stands_in_for_the_configured_one(cfg: DataConfig, tokenizer: Tokenizer):
    for configured in (cfg, replace(cfg, tokenizer="gone.json")):
        corpus = build_corpus(configured, VOCAB + 20, SEED, lambda line: None, tokenizer)
        assert corpus.tokenizer is tokenizer


def test_what_was_found_is_said_with_its_sizes(cfg: DataConfig):
    corpus, said = build(replace(cfg, source=(cfg.source, cfg.source)))
    size = sum(len(document.text) for document in load_documents(cfg.source))
    told = "\n".join(said)
    assert f"{cfg.source} {cfg.source}: " in told
    assert f"{size / 1e6:.1f} MB" in told
    train, validation = corpus.train.corpus, corpus.validation.corpus
    assert f"{len(train.offsets) - 1} documents to train on" in told
    assert f"{len(validation.offsets) - 1} held out" in told
    assert f"{len(train.tokens) / 1e6:.2f} M to train on" in told
    assert f"vocabulary {corpus.tokenizer.vocab_size}" in told


def test_a_second_build_reads_tokenizer_and_tokens_from_the_cache(
    cfg: DataConfig, cache_home: Path, monkeypatch: pytest.MonkeyPatch
):
    first, _ = build(cfg)
    assert len(list(cache_home.rglob("*.json"))) == 1
    assert len(list(cache_home.rglob("*.npz"))) == 2
    monkeypatch.setattr(Tokenizer, "encode_batch", None)  # nothing is tokenised any more
    second, _ = build(cfg)
    assert np.array_equal(first.train.corpus.tokens, second.train.corpus.tokens)
    shutil.rmtree(cache_home)
    with pytest.raises(TypeError):
        build(cfg)


def test_text_that_changes_changes_the_hash(cfg: DataConfig, tmp_path: Path):
    before, _ = build(cfg)
    (tmp_path / "text" / "0.py").write_text("x = 1\n")
    assert build(cfg)[0].content_hash != before.content_hash
