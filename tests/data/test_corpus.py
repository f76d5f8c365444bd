"""From a `DataConfig` to rows: both splits, the tokenizer of the training split alone, and what is
said about them.
"""

import collections
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from rich.console import Console
from tokenizers import models
from tokenizers.pre_tokenizers import ByteLevel

from dsv3_jax.config import DataConfig
from dsv3_jax.data import shards
from dsv3_jax.data.corpus import Corpus, build_corpus
from dsv3_jax.data.documents import content_hash
from dsv3_jax.data.sources import load_documents
from dsv3_jax.data.tokenizer import FIM_TOKENS, Tokenizer, train_tokenizer
from dsv3_jax.pretokenize import write
from tests.data.corpora import split_documents

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


def test_a_divided_document_is_told(cfg: DataConfig, tmp_path: Path):
    (tmp_path / "one.txt").write_text("".join(f"line {i} of one text\n" for i in range(400)))
    told = "\n".join(build(replace(cfg, source=str(tmp_path / "*.txt")))[1])
    assert "1 document to train on, 1 held out (one was cut in two), " in told
    assert "cut in two" not in "\n".join(build(cfg)[1])


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


# --- several sources ---


@pytest.fixture
def three(tmp_path: Path, cfg: DataConfig) -> DataConfig:
    """A second and a third source, whose texts have letters of their own."""
    for letter in "yz":
        lines = [f'{{"text": "{letter * (i % 9 + 1)} {i}\\n"}}' for i in range(60)]
        (tmp_path / f"{letter}.jsonl").write_text("\n".join(lines))
    files = (str(tmp_path / f"{letter}.jsonl") for letter in "yz")
    return replace(cfg, source=(cfg.source, *files))


def test_weights_give_each_source_its_share_of_rows(three: DataConfig):
    corpus, said = build(replace(three, weights=(0.5, 0.3, 0.2)))
    files = ["/text/", "y.jsonl", "z.jsonl"]
    seen = [next(f for f in files if f in corpus.train.names_of(i)[0]) for i in range(100)]
    assert [seen.count(f) for f in files] == [50, 30, 20]
    assert sum(line.startswith("data ") for line in said) == 3
    for name, line in zip(three.source, said, strict=False):
        assert f"data       {name}: " in line
    seeds = [rows.seed for rows in corpus.train.sources]
    assert len(set(seeds)) == 3


def test_held_out_documents_of_all_sources_are_validated(three: DataConfig):
    for weights in ((), (0.5, 0.3, 0.2), (0.0, 0.0, 1.0)):
        corpus, _ = build(replace(three, weights=weights))
        rows = corpus.validation
        names = {name for i in range(len(rows)) for name in rows.names_of(i)}
        for place, source in enumerate(three.source):
            documents = load_documents(source)
            _, held_out = split_documents(documents, three.validation_fraction)
            named = {d.name for d in held_out}
            assert named <= names, (weights, place)
        labels = np.concatenate([row.labels_T for row in rows])
        assert (labels >= 0).sum() == rows.corpus.lengths.sum()


def test_weights_change_neither_the_tokenizer_nor_the_hash(three: DataConfig):
    first, _ = build(replace(three, weights=(0.5, 0.3, 0.2)))
    other, _ = build(replace(three, weights=(0.0, 1.0, 7.0)))
    assert first.content_hash == other.content_hash
    assert first.tokenizer.content_hash == other.tokenizer.content_hash
    fewer, _ = build(replace(three, source=three.source[:2], weights=(0.5, 0.5)))
    assert fewer.content_hash != first.content_hash


def test_without_weights_all_sources_are_one_corpus(three: DataConfig):
    corpus, _ = build(three)
    assert corpus.content_hash == content_hash(load_documents(three.source))
    labels = np.concatenate([corpus.train[i].labels_T for i in range(len(corpus.train))])
    assert (labels >= 0).sum() == corpus.train.corpus.lengths.sum()


# --- middle last, split, isolated ---


def test_only_training_text_is_rearranged_and_split(cfg: DataConfig):
    plain, _ = build(cfg)
    changed, _ = build(replace(cfg, fim_rate=1.0, split_rate=1.0))
    begin = changed.tokenizer.id_of(FIM_TOKENS[0])
    train = np.concatenate([row.labels_T for row in changed.train])
    assert (train == begin).sum() == len(changed.train.corpus.lengths)
    assert changed.train.corpus.lengths.sum() > plain.train.corpus.lengths.sum()
    for found, expected in zip(changed.validation, plain.validation, strict=True):
        np.testing.assert_array_equal(found.tokens_T, expected.tokens_T)
        np.testing.assert_array_equal(found.labels_T, expected.labels_T)


def test_no_byte_of_an_epoch_is_lost_with_everything_on(three: DataConfig):
    cfg = replace(three, fim_rate=0.5, split_rate=0.5, weights=(0.5, 0.3, 0.2))
    corpus, _ = build(cfg)
    for rows, source in zip(corpus.train.sources, three.source, strict=True):
        train, _ = split_documents(load_documents(source), cfg.validation_fraction)
        expected = collections.Counter(byte for d in train for byte in d.text.encode())
        first = 0
        for epoch in range(2):
            count = rows.rows_of_epoch(epoch)
            labels = np.concatenate([rows[first + i].labels_T for i in range(count)])
            pieces = [corpus.tokenizer.token_bytes[i] for i in labels[labels >= 0].tolist()]
            assert collections.Counter(b"".join(pieces)) == expected
            first += count


def test_isolation_reaches_both_splits(cfg: DataConfig):
    corpus, _ = build(replace(cfg, isolate=True))
    assert corpus.train[0].segments_T is not None
    assert corpus.validation[0].segments_T is not None
    assert build(cfg)[0].validation[0].segments_T is None


def test_held_out_text_of_which_nothing_is_predicted_is_refused(tmp_path: Path):
    """A tokenizer without bos: the only character of a document is its first token."""
    byte_tokenizer(tmp_path / "plain.json")
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{c}"}}\n' for c in "abcdefghijkl"))
    cfg = DataConfig(
        source=str(tmp_path / "a.jsonl"),
        tokenizer=str(tmp_path / "plain.json"),
        validation_fraction=0.5,
        length=4,
    )
    build(cfg)
    with pytest.raises(ValueError, match=r"a.jsonl: no token of the held-out text is predicted"):
        build(replace(cfg, isolate=True))


def byte_tokenizer(path: Path) -> None:
    """A tokenizer of single bytes that knows the end of a text and no other special token."""
    vocabulary = {symbol: i for i, symbol in enumerate(["</s>", *ByteLevel.alphabet()])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.save(str(path))


def test_a_tokenizer_without_the_tokens_of_the_middle_is_refused(cfg: DataConfig, tmp_path: Path):
    byte_tokenizer(tmp_path / "plain.json")
    plain = replace(cfg, tokenizer=str(tmp_path / "plain.json"))
    build(plain)
    with pytest.raises(ValueError, match=f"data.fim_rate is 0.1, but .* lacks {FIM_TOKENS[0]}"):
        build(replace(plain, fim_rate=0.1))


# --- pre-tokenised folders ---


def pretokenize(cfg: DataConfig, source: str, out: Path, vocab_size: int = VOCAB) -> str:
    write(replace(cfg, source=source), out, vocab_size, Console(quiet=True))
    return str(out)


def test_folders_and_text_are_one_corpus_of_one_tokenizer(three: DataConfig, tmp_path: Path):
    text, *files = three.source
    folder = pretokenize(three, text, tmp_path / "a")
    own = shards.TokenFolder(tmp_path / "a").tokenizer
    for weights in ((), (0.5, 0.3, 0.2)):
        corpus, _ = build(replace(three, source=(folder, *files), weights=weights))
        assert corpus.tokenizer.content_hash == own.content_hash
        parts = corpus.train.sources if weights else [corpus.train]
        found = collections.Counter()
        for rows in parts:
            for document in range(len(rows.corpus.lengths)):
                ids = rows.corpus.read(document)[1:-1].tolist()
                found[corpus.tokenizer.decode(ids)] += 1
        wanted = collections.Counter()
        for source in three.source:
            train, _ = split_documents(load_documents(source), three.validation_fraction)
            wanted.update(document.text for document in train)
        assert found == wanted


def test_a_folder_of_two_spellings_counts_once(
    three: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = pretokenize(three, three.source[0], tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    once, _ = build(replace(three, source=(folder,), weights=()))
    twice, _ = build(replace(three, source=(folder, "a"), weights=()))
    assert len(twice.train) == len(once.train)
    assert twice.content_hash == once.content_hash


def test_folders_of_several_tokenizers_are_refused(three: DataConfig, tmp_path: Path):
    text, other, _ = three.source
    folders = (
        pretokenize(three, text, tmp_path / "a"),
        pretokenize(three, other, tmp_path / "b"),
    )
    with pytest.raises(ValueError, match=r"allowed: folders and data\.tokenizer of one") as error:
        build(replace(three, source=folders))
    assert f"{folders[1]} was written with another tokenizer than" in str(error.value)
    given = tmp_path / "b" / "tokenizer.json"
    with pytest.raises(ValueError, match=f"{folders[0]} was written with another tokenizer"):
        build(replace(three, source=folders[0], tokenizer=str(given)))
    build(replace(three, source=folders[1], tokenizer=str(given)))


@pytest.mark.parametrize(("name", "value"), [("validation_fraction", 0.4), ("split_rate", 0.1)])
def test_a_folder_written_otherwise_is_refused(
    cfg: DataConfig, tmp_path: Path, name: str, value: float
):
    folder = pretokenize(cfg, cfg.source, tmp_path / "a")
    with pytest.raises(ValueError, match=f"data.{name} is {value}; ") as error:
        build(replace(cfg, source=folder, **{name: value}))
    assert f"{folder} was written with {getattr(cfg, name)}; allowed" in str(error.value)


def test_a_folder_whose_tokenizer_is_too_large_is_refused(cfg: DataConfig, tmp_path: Path):
    folder = pretokenize(cfg, cfg.source, tmp_path / "a")
    size = shards.TokenFolder(tmp_path / "a").tokenizer.vocab_size
    with pytest.raises(ValueError, match=f"has {size} ids; model.vocab_size is {size - 1}"):
        build(replace(cfg, source=folder), vocab_size=size - 1)
