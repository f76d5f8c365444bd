"""A folder that appears under its name when it is complete, and not before."""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from dsv3_jax.files import sync, sync_tree

# What we write, and what tokenizers of the family bring along.
_OF_A_MODEL = re.compile(
    r"checkpoints|(generation_)?config\.json|.*\.safetensors(\.index\.json)?|tokenizer.*\.json"
    r"|special_tokens_map\.json|.*\.jinja|tiktoken\.model|tokenization_.*\.py"
)


@contextlib.contextmanager
def new_folder(path: Path, size: int, overwrite: bool) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, which takes that name when the block ends.

    After an error inside the block it is removed, and what stood under `path` stands there still.
    ValueError if `path` is in use: an empty folder is not, and with `overwrite` a folder that holds
    a model and nothing else is replaced whole. OSError if fewer than `size` bytes are free.
    """
    path = path.resolve()
    parent = path.parent
    parent.mkdir(parents=True, exist_ok=True)
    _settle(path)
    check_free_name(path, overwrite)
    check_disk(parent, size)
    temporary = parent / f".{path.name}.{secrets.token_hex(4)}.part"
    try:
        temporary.mkdir()
        yield temporary
        sync_tree(temporary)
        _publish(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free_name(path: Path, overwrite: bool) -> None:
    """ValueError if `new_folder` could not take this name."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path} is a file; allowed: a new folder")
    held = sorted(entry.name for entry in path.iterdir())
    if not held:
        return
    if "config.json" not in held:
        raise ValueError(f"{path} holds {held[0]} and no model; allowed: a new or an empty folder")
    if not overwrite:
        raise ValueError(f"{path} holds a model already; --overwrite (overwrite=True) replaces it")
    others = [name for name in held if not _OF_A_MODEL.fullmatch(name)]
    if others:
        raise ValueError(
            f"{path} holds {others[0]}, which is no part of a model; allowed to overwrite: what "
            "convert and save_pretrained write"
        )


def check_disk(folder: Path, size: int) -> None:
    """OSError if a disk has less room than `size` bytes."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(
            f"not enough disk for {size / 1e9:,.2f} GB: {free / 1e9:,.2f} GB free in {folder}"
        )


def _settle(path: Path) -> None:
    """Ends what a killed process began: an old folder takes its name back where no new one has it;
    what else it left is removed.
    """
    left = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.(old|part)")
    for entry in sorted(path.parent.iterdir()):
        match = left.fullmatch(entry.name)
        if match and match[1] == "old" and not path.exists():
            os.rename(entry, path)
        elif match:
            shutil.rmtree(entry)


def _publish(temporary: Path, path: Path) -> None:
    """The old folder steps aside first, since a folder is not renamed onto one with content."""
    aside = temporary.with_suffix(".old")
    try:
        if path.exists():
            os.rename(path, aside)
        os.rename(temporary, path)
        sync(path.parent)
    finally:
        if aside.exists() and not path.exists():
            os.rename(aside, path)
        shutil.rmtree(aside, ignore_errors=True)
