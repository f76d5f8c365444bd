"""The tokenizer beside a model: whether text and ids of the two fit together."""

from pathlib import Path
from typing import NamedTuple

from dsv3_jax.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer


class Found(NamedTuple):
    """What a folder's tokenizer is, in half a line."""

    is_usable: bool
    said: str


def open_tokenizer(folder: Path) -> Tokenizer:
    """ValueError where a folder has none that can be used."""
    file = find_tokenizer(folder)
    if file is None:
        raise ValueError(
            f"{folder}: neither tokenizer.json nor tiktoken.model, without which ids are no text"
        )
    return load_tokenizer(file)


def check_ids(tokenizer: Tokenizer, vocab_size: int) -> None:
    """ValueError if a text could have ids that the model has no row for."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{tokenizer.name} has ids up to {tokenizer.vocab_size - 1}; "
            f"allowed: below the model's vocab_size = {vocab_size}"
        )


def look_at_tokenizer(folder: Path, vocab_size: int | None) -> Found:
    """`vocab_size` of the model, where that is known."""
    try:
        tokenizer = open_tokenizer(folder)
        if vocab_size is not None:
            check_ids(tokenizer, vocab_size)
    except ValueError as error:
        return Found(False, f"none that can be used: {error}")
    ids = f"{tokenizer.vocab_size:,} ids, begin {tokenizer.bos_id}, end {tokenizer.eos_id}"
    return Found(True, f"{Path(tokenizer.name).name}, {ids}")
