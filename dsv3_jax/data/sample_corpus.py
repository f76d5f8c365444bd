"""From a `DataConfig` of conversations to rows: template, answers, split, samples (report 5.1)."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from dsv3_jax.config import DataConfig
from dsv3_jax.data.answers import AnswerTemplate, Sample
from dsv3_jax.data.cache import TextsHash
from dsv3_jax.data.conversations import Conversation, read_conversations
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.documents import text_hash
from dsv3_jax.data.held_out import is_held_out
from dsv3_jax.data.paths import user_path
from dsv3_jax.data.samples import SampleRows, Samples
from dsv3_jax.data.sources import entries_of
from dsv3_jax.data.tokenised import check_fits
from dsv3_jax.data.tokenizer import Tokenizer

_SECONDS = 10.0  # between two lines of progress


class _Read(NamedTuple):
    name: str
    asked: str
    """What its users say, which decides whether it is held out: whatever is answered to a question,
    all samples of it are on one side"""
    sample: Sample


class _Counts:
    """Of what is not learned from."""

    def __init__(self) -> None:
        self.rejected = self.dropped = self.cut = self.all = 0


def build_samples(
    cfg: DataConfig,
    vocab_size: int,
    seed: int,
    say: Callable[[str], None],
    tokenizer: Tokenizer | None,
    folder: Path | None = None,
) -> Corpus:
    """Reads, encodes, splits and packs; each stage tells `say` what it found.

    The template is data.chat_template's, else that of the model in `folder`, else DeepSeek's.
    ValueError, with file and line where it has them, for samples, templates and
    tokenizers that cannot be used, and where no sample is left.
    """
    if tokenizer is None:
        raise ValueError(
            "data.tokenizer is train; allowed with data.format messages: that of --init-from, or "
            "the path of a tokenizer.json"
        )
    check_fits(tokenizer, vocab_size)
    template = template_of(cfg, tokenizer, folder)
    digest, counts = TextsHash(), _Counts()
    digest.add(template.source.encode())
    read = list(_samples(cfg, template, digest, counts, say))
    if len({one.asked for one in read}) < 2:
        raise ValueError(
            f"data.source {' '.join(entries_of(cfg.source))}: {_left(read, counts)}"
            f"{_told(cfg, counts)}; allowed: two questions or more, one to train on and one to "
            "hold out"
        )
    train, held_out = _divided(read, cfg.validation_fraction)
    samples = _samples_of(train, tokenizer)
    rows = SampleRows(samples, cfg.length, seed)
    validation = SampleRows(_samples_of(held_out, tokenizer), cfg.length)
    say(
        f"data       {' '.join(entries_of(cfg.source))}: {len(train):,} samples to train on, "
        f"{len(held_out):,} held out{_told(cfg, counts)}"
    )
    full = int(samples.places.sum()) / (len(rows) * cfg.length)
    say(
        f"tokens     {len(samples.tokens):,} to train on, "
        f"{samples.num_labels:,} of them answers, in {len(rows):,} rows that are "
        f"{full:.1%} full; by {template.name}"
    )
    return Corpus(tokenizer, rows, validation, digest.hexdigest(), template)


def template_of(cfg: DataConfig, tokenizer: Tokenizer, folder: Path | None) -> AnswerTemplate:
    """data.chat_template's, else the folder's own, else DeepSeek's. ValueError for what is none,
    and for a file that cannot be read.
    """
    if not cfg.chat_template:
        return AnswerTemplate.of_folder(folder, tokenizer) if folder else AnswerTemplate(tokenizer)
    file = user_path(cfg.chat_template, "data.chat_template")
    try:
        return AnswerTemplate.of_file(file, tokenizer)
    except OSError as error:
        raise ValueError(f"data.chat_template {file}: {error.strerror}") from None


def _samples(
    cfg: DataConfig,
    template: AnswerTemplate,
    digest: TextsHash,
    counts: _Counts,
    say: Callable[[str], None],
) -> Iterator[_Read]:
    said = time.monotonic()
    for one in read_conversations(cfg.source, cfg.bad_utf8):
        counts.all += 1
        if time.monotonic() - said >= _SECONDS:
            say(f"           {counts.all:,} samples read")
            said = time.monotonic()
        if one.rejected:
            counts.rejected += 1
            continue
        digest.add(json.dumps(one.messages, ensure_ascii=False).encode())
        sample = _fitted(_encoded(template, one), cfg, counts)
        if sample is not None:
            users = [m["content"] for m in one.messages if m["role"] == "user"]
            yield _Read(one.name, json.dumps(users), sample)


def _encoded(template: AnswerTemplate, one: Conversation) -> Sample:
    try:
        return template.sample(one.messages)
    except ValueError as error:
        raise ValueError(f"{one.where}: {error}") from None


def _fitted(sample: Sample, cfg: DataConfig, counts: _Counts) -> Sample | None:
    """What of it has a place in a row, if anything of that is an answer."""
    room = cfg.length + 1  # the last token is a label only
    if len(sample.tokens_N) <= room:
        return sample
    beginning = Sample(sample.tokens_N[:room], sample.answer_N[:room])
    if cfg.too_long == "drop" or not beginning.answer_N[1:].any():
        counts.dropped += 1
        return None
    counts.cut += 1
    return beginning


def _divided(read: list[_Read], fraction: float) -> tuple[list[_Read], list[_Read]]:
    """Samples to train on and samples held out, by a hash of what is asked. Where one side is empty
    (few samples), the question with its next hash goes there.
    """
    hashes = [text_hash(one.asked) for one in read]
    held_out = {h for h, one in zip(hashes, read, strict=True) if is_held_out(one.asked, fraction)}
    if not held_out:
        held_out = {min(hashes)}
    elif len(held_out) == len(set(hashes)):
        held_out.remove(max(hashes))
    pairs = list(zip(hashes, read, strict=True))
    return (
        [one for h, one in pairs if h not in held_out],
        [one for h, one in pairs if h in held_out],
    )


def _samples_of(read: Iterable[_Read], tokenizer: Tokenizer) -> Samples:
    read = list(read)
    return Samples([one.sample for one in read], [one.name for one in read], tokenizer.eos_id)


def _left(read: list[_Read], counts: _Counts) -> str:
    """Of what is too little."""
    if not read:
        return f"no sample is left of {counts.all:,}" if counts.all else "no sample is in it"
    if len(read) == 1:
        return f"1 sample is left of {counts.all:,}"
    return f"{len(read):,} samples are left of {counts.all:,}, and all ask the same"


def _told(cfg: DataConfig, counts: _Counts) -> str:
    parts = [
        f"; {count:,} {what}"
        for count, what in (
            (counts.rejected, "rejected by their verification"),
            (counts.dropped, f"dropped, longer than data.length {cfg.length}"),
            (counts.cut, f"cut to data.length {cfg.length}"),
        )
        if count
    ]
    return "".join(parts)
