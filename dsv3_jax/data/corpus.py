"""From a `DataConfig` to rows: documents, split, tokenizer, tokens, mixture (report 4.1)."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsv3_jax.config import DataConfig
from dsv3_jax.data.answers import AnswerTemplate
from dsv3_jax.data.cache import hash_texts
from dsv3_jax.data.chat import TEMPLATE_FILE
from dsv3_jax.data.documents import Document
from dsv3_jax.data.fim import fim_of
from dsv3_jax.data.hashing import key64
from dsv3_jax.data.held_out import Survey, survey
from dsv3_jax.data.mixture import Mixture
from dsv3_jax.data.packing import Rows
from dsv3_jax.data.paths import user_path
from dsv3_jax.data.samples import SampleRows
from dsv3_jax.data.shards import TokenFolder, is_token_folder
from dsv3_jax.data.sources import entries_of, load_documents
from dsv3_jax.data.tokenised import (
    Selected,
    TokenDocuments,
    cached_tokenize,
    check_fits,
    joined,
)
from dsv3_jax.data.tokenizer import Tokenizer, cached_tokenizer, load_tokenizer
from dsv3_jax.files import replace_file


@dataclass(frozen=True, eq=False)
class Corpus:
    """Rows to train on, rows held out in the order of their documents, if any are, and their
    tokenizer.
    """

    tokenizer: Tokenizer
    train: Rows | Mixture | SampleRows
    validation: Rows | SampleRows | None
    content_hash: str
    """Of all documents, both splits; weights do not count"""
    template: AnswerTemplate | None = None
    """Of conversations"""

    @property
    def end_ids(self) -> frozenset[int]:
        """What ends a text, or an answer."""
        ends = self.template.ends() if self.template else frozenset()
        return ends | {self.tokenizer.eos_id}

    def opening(self, prompt: str) -> list[int]:
        """What a model goes on from: a text's beginning, or a question.

        ValueError, one line, for what the template refuses.
        """
        if self.template:
            return self.template.encode([{"role": "user", "content": prompt}])
        return [self.tokenizer.bos_id, *self.tokenizer.encode(prompt).tolist()]

    def save(self, folder: Path) -> None:
        """Writes what makes ids of texts: the tokenizer and, if there is one, the template."""
        self.tokenizer.save(folder / "tokenizer.json")
        if self.template:
            replace_file(folder / TEMPLATE_FILE, self.template.source.encode())


def build_corpus(
    cfg: DataConfig,
    vocab_size: int,
    seed: int,
    say: Callable[[str], None],
    tokenizer: Tokenizer | None = None,
) -> Corpus:
    """Reads, splits and tokenises; each stage tells `say` what it found.

    A given `tokenizer` (a resumed run's own) stands in for the configured one. ValueError for bad
    data or tokenizer, or pre-tokenised folders that fit neither each other nor the configuration.
    """
    entries = entries_of(cfg.source)
    # With weights each entry is a source of its own, else all together are one.
    sources = [_Source(cfg, (e,)) for e in entries] if cfg.weights else [_Source(cfg, entries)]
    for source in sources:
        say(source.found())
    folders = [folder for source in sources for folder in source.folders]
    if any(source.train for source in sources):
        say("           tokenising (some ten seconds the first time, then from the cache)")
    if tokenizer is None:
        tokenizer = _tokenizer(cfg, vocab_size, sources, folders)
    check_fits(tokenizer, vocab_size)
    for folder in folders:
        _check_folder(cfg, folder, tokenizer)
    train = [source.tokens(tokenizer, vocab_size, held_out=False) for source in sources]
    held_out = [source.tokens(tokenizer, vocab_size, held_out=True) for source in sources]
    validation = Rows(joined(held_out), cfg.length, isolate=cfg.isolate)
    say(
        f"tokens     {sum(int(part.lengths.sum()) for part in train) / 1e6:.2f} M to train on, "
        f"{validation.corpus.lengths.sum() / 1e3:.0f} k held out, "
        f"vocabulary {tokenizer.vocab_size:,}"
    )
    _check_text(cfg, tokenizer, validation)
    identity = [source.content_hash for source in sources]
    return Corpus(tokenizer, _train_rows(cfg, train, tokenizer, seed), validation, _one(identity))


def _train_rows(
    cfg: DataConfig, train: list[TokenDocuments], tokenizer: Tokenizer, seed: int
) -> Rows | Mixture:
    fim = fim_of(tokenizer, cfg.fim_rate)
    if len(train) == 1:
        return Rows(train[0], cfg.length, seed, fim, cfg.isolate)
    seeds = [key64("source", seed, place) for place in range(len(train))]
    pairs = zip(train, seeds, strict=True)
    return Mixture([Rows(t, cfg.length, s, fim, cfg.isolate) for t, s in pairs], cfg.weights)


class _Source:
    """Entries that are one collection of documents: texts, then pre-tokenised folders."""

    def __init__(self, cfg: DataConfig, entries: tuple[str, ...]) -> None:
        self._cfg, self._name = cfg, " ".join(entries)
        named = (entry for entry in entries if entry != "stdlib")
        paths = {entry: user_path(entry, "data.source") for entry in named}
        paths = {entry: path for entry, path in paths.items() if is_token_folder(path)}
        folders = {os.path.realpath(path): path for path in paths.values()}
        self.folders = [TokenFolder(path) for path in folders.values()]
        self._survey: Survey | None = None
        self.train: list[Document] = []
        self._held_out: list[Document] = []
        texts = tuple(entry for entry in entries if entry not in paths)
        if texts:
            documents = load_documents(texts, cfg.text_field, cfg.bad_utf8)
            self._survey = survey(documents, cfg.validation_fraction)
            for document, held_out in self._survey.divide(documents):
                (self._held_out if held_out else self.train).append(document)

    @property
    def content_hash(self) -> str:
        """Of the texts, wherever they lie."""
        texts = [self._survey.content_hash] if self._survey else []
        return _one([*texts, *(folder.manifest.content_hash for folder in self.folders)])

    def found(self) -> str:
        """How much there is, in a line."""
        in_folders = sum(int(folder.held_out.sum()) for folder in self.folders)
        held_out = len(self._held_out) + in_folders
        total = len(self.train) + held_out - in_folders
        total += sum(folder.manifest.documents for folder in self.folders)
        size = sum(folder.manifest.bytes for folder in self.folders)
        size += self._survey.bytes if self._survey else 0
        train = total - held_out
        cut = " (one was cut in two)" if self._survey and self._survey.cut else ""
        return (
            f"data       {self._name}: {train:,} document{'s' * (train != 1)} to train on, "
            f"{held_out:,} held out{cut}, {size / 1e6:.1f} MB"
        )

    def tokens(self, tokenizer: Tokenizer, vocab_size: int, held_out: bool) -> TokenDocuments:
        """One side of the split."""
        parts: list[TokenDocuments] = []
        documents = self._held_out if held_out else self.train
        split_rate = 0.0 if held_out else self._cfg.split_rate
        if documents:
            tokens = cached_tokenize(documents, tokenizer, vocab_size, split_rate=split_rate)
            parts.append(tokens)
        for folder in self.folders:
            parts.append(Selected(folder, np.flatnonzero(folder.held_out == held_out)))
        return joined(parts)


def _tokenizer(
    cfg: DataConfig, vocab_size: int, sources: list[_Source], folders: list[TokenFolder]
) -> Tokenizer:
    """The configured tokenizer, where folders do not bring their own."""
    if cfg.tokenizer != "train":
        return load_tokenizer(cfg.tokenizer)
    if folders:
        return folders[0].tokenizer
    texts = [document.text for source in sources for document in source.train]
    return cached_tokenizer(texts, vocab_size)


def _check_text(cfg: DataConfig, tokenizer: Tokenizer, validation: Rows) -> None:
    """ValueError if no label of the held-out rows stands for a byte of text."""
    lengths_V = tokenizer.byte_lengths_V
    if not any(lengths_V[row.labels_T[row.labels_T >= 0]].any() for row in validation):
        raise ValueError(
            f"data.source {' '.join(entries_of(cfg.source))}: no token of the held-out text is "
            "predicted from another; allowed: longer documents, or rows that are not isolated"
        )


def _check_folder(cfg: DataConfig, folder: TokenFolder, tokenizer: Tokenizer) -> None:
    """ValueError if a folder was not written as the configuration reads."""
    if folder.tokenizer.content_hash != tokenizer.content_hash:
        raise ValueError(
            f"data.source: {folder.path} was written with another tokenizer than "
            f"{tokenizer.name}; allowed: folders and data.tokenizer of one tokenizer"
        )
    for name in ("validation_fraction", "split_rate"):
        wanted, found = getattr(cfg, name), getattr(folder.manifest, name)
        if wanted != found:
            raise ValueError(
                f"data.{name} is {wanted}; data.source {folder.path} was written with {found}; "
                f"allowed: {found}, or another folder"
            )


def _one(hashes: list[str]) -> str:
    return hashes[0] if len(hashes) == 1 else hash_texts(hashes)
