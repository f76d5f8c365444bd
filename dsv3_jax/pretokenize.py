"""`python -m dsv3_jax.pretokenize`: text to folders of tokens, once, for many runs (report 4.1).

Goes through the text document by document, so a corpus may be larger than the memory. The folder
serves as `data.source`; training then sees the same rows, bit for bit, as on the text itself.
"""

import contextlib
import dataclasses
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from dsv3_jax.cli import clean_on_signals, parse, run, user_errors
from dsv3_jax.config import DataConfig
from dsv3_jax.config.presets import tiny
from dsv3_jax.files import held

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from dsv3_jax.data.documents import Document
    from dsv3_jax.data.shards import Manifest

PROG = "python -m dsv3_jax.pretokenize"
DESCRIPTION = """Tokenise text once, for many training runs.

Writes a folder of ArrayRecord shards, tokenizer and index, to be named as --data.source of
python -m dsv3_jax.train. A folder counts when its manifest is there, and that is written last.
"""


@dataclass(frozen=True)
class Options:
    """The command's options; those that training has as well mean the same there."""

    out: Path
    """Folder to write; new or empty"""
    source: tuple[str, ...] = ("stdlib",)
    """'stdlib' or globs of UTF-8 text, .jsonl, .jsonl.gz or .parquet files"""
    tokenizer: str = "train"
    """'train' (byte-level BPE, from the part that is not held out) or a tokenizer.json"""
    vocab_size: int = tiny().vocab_size
    """Ids of a trained tokenizer; a given one may have any number"""
    validation_fraction: float = DataConfig.validation_fraction
    """Share of documents, chosen by hash, that is never trained on"""
    split_rate: float = DataConfig.split_rate
    """Share of the tokens that join punctuation with line ends that is split"""
    text_field: str = DataConfig.text_field
    """Of a JSONL line or a Parquet row: where the text is"""
    bad_utf8: Literal["reject", "replace"] = DataConfig.bad_utf8
    """Bytes that are no UTF-8: an error, or U+FFFD"""

    def data(self) -> DataConfig:
        """The same choices as training has them."""
        return DataConfig(
            source=self.source,
            tokenizer=self.tokenizer,
            validation_fraction=self.validation_fraction,
            split_rate=self.split_rate,
            text_field=self.text_field,
            bad_utf8=self.bad_utf8,
        )


def main(args: Sequence[str]) -> int | None:
    """The command. SystemExit 2 for the user's mistakes."""
    default = Options(out=tyro.MISSING)
    options = parse(Options, default, prog=PROG, description=DESCRIPTION, args=args)
    from dsv3_jax.train.console import RunConsole

    console = RunConsole()
    with clean_on_signals(), user_errors(), _own_flags():
        cfg = options.data()
        manifest = write(cfg, options.out, options.vocab_size, console)
        console.print(_summary(options.out, manifest), soft_wrap=True, highlight=False)


@contextlib.contextmanager
def _own_flags() -> Iterator[None]:
    """Errors name the flags of this command, not the fields of a training run's configuration."""
    names = "|".join(field.name for field in dataclasses.fields(Options))
    try:
        yield
    except ValueError as error:
        text = re.sub(
            rf"\b(?:data|model)\.({names})\b",
            lambda match: f"--{match[1].replace('_', '-')}",
            str(error),
        )
        raise ValueError(text) from error


def write(cfg: DataConfig, out: Path, vocab_size: int, console: "Console") -> "Manifest":
    """Goes through the text three times: to divide it, to train a tokenizer, to write tokens.

    ValueError or OSError, one line, for what cannot work; the folder is then as it was.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from dsv3_jax.data.tokenizer import check_vocab_size, load_tokenizer

    _check_text(cfg)
    if cfg.tokenizer == "train":
        check_vocab_size(vocab_size)
    else:
        load_tokenizer(cfg.tokenizer)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with _empty(out), Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        return _write(cfg, out, vocab_size, progress)


def _write(cfg: DataConfig, out: Path, vocab_size: int, progress: "Progress") -> "Manifest":
    from dsv3_jax.data.held_out import survey
    from dsv3_jax.data.shards import ShardWriter
    from dsv3_jax.data.tokenised import encode_documents
    from dsv3_jax.data.tokenizer import load_tokenizer, train_tokenizer

    found = survey(_documents(cfg, progress, "reading", None), cfg.validation_fraction)
    if cfg.tokenizer == "train":
        documents = _documents(cfg, progress, "training the tokenizer", found.documents)
        divided = found.divide(documents)
        texts = (document.text for document, held_out in divided if not held_out)
        tokenizer = train_tokenizer(texts, vocab_size)
    else:
        tokenizer = load_tokenizer(cfg.tokenizer)
    documents = _documents(cfg, progress, "writing tokens", found.documents)
    documents = _unchanged(documents, found.content_hash)
    writer = ShardWriter(out, tokenizer)
    try:
        for document in encode_documents(found.divide(documents), tokenizer, cfg.split_rate):
            writer.add(*document)
        return writer.finish(
            bytes=found.bytes,
            content_hash=found.content_hash,
            validation_fraction=cfg.validation_fraction,
            split_rate=cfg.split_rate,
        )
    except BaseException:
        writer.discard()
        raise


def _summary(out: Path, manifest: "Manifest") -> str:
    """What was written, and the options with which training reads it."""
    size = sum(file.bytes for file in manifest.files.values())
    flags = f"--data.source {shlex.quote(str(out))} --model.vocab-size {manifest.vocab_size}"
    for name in ("validation_fraction", "split_rate"):
        value = getattr(manifest, name)
        if value != getattr(DataConfig, name):
            flags += f" --data.{name.replace('_', '-')} {value}"
    return (
        f"{out}: {manifest.documents:,} documents, {manifest.tokens / 1e6:,.2f} M tokens, "
        f"{size / 1e6:,.1f} MB, shards: {len(manifest.shards):,}; train on it with {flags}"
    )


def _documents(
    cfg: DataConfig, progress: "Progress", doing: str, total: int | None
) -> Iterator["Document"]:
    from dsv3_jax.data.sources import iterate_documents

    task, count = progress.add_task(doing, total=total), 0
    for document in iterate_documents(cfg.source, cfg.text_field, cfg.bad_utf8):
        yield document
        count += 1
        progress.update(task, completed=count)
    progress.update(task, total=count)  # known only now, on the first way through


def _unchanged(documents: Iterator["Document"], content_hash: str) -> Iterator["Document"]:
    """The documents; ValueError after the last one if they are not those of before."""
    from dsv3_jax.data.cache import TextsHash

    digest = TextsHash()
    for document in documents:
        digest.add(document.text.encode())
        yield document
    if digest.hexdigest() != content_hash:
        raise ValueError("data.source has changed while it was read; write the folder again")


def _check_text(cfg: DataConfig) -> None:
    from dsv3_jax.data.paths import user_path
    from dsv3_jax.data.shards import is_token_folder
    from dsv3_jax.data.sources import entries_of

    for entry in entries_of(cfg.source):
        path = user_path(entry, "--source")
        if is_token_folder(path):
            raise ValueError(f"--source {entry} holds tokens already; allowed: text")
        if path.is_dir():
            raise ValueError(
                f"--source {entry} is a folder; allowed: files, as in '{entry}/**/*.txt'"
            )


@contextlib.contextmanager
def _empty(out: Path) -> Iterator[None]:
    """An empty folder that no other process writes to; a new one goes if that fails."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; allowed: a new or an empty folder")
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    # It stays empty for as long as the text is read, so emptiness does not keep others away.
    with held(out, ValueError(f"--out {out}: another process is writing there")):
        there = sorted(path.name for path in out.iterdir())
        if there:
            raise ValueError(f"--out {out} holds {there[0]}; allowed: a new or an empty folder")
        try:
            yield
        except BaseException:
            if is_new and not any(out.iterdir()):
                out.rmdir()
            raise


if __name__ == "__main__":
    run(main)
