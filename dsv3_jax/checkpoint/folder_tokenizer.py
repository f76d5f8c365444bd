"""The tokenizer beside a model: whether text and ids of the two fit together."""

from pathlib import Path

from dsv3_jax.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer


def open_tokenizer(folder: Path, vocab_size: int | None = None) -> Tokenizer:
    """ValueError where a folder has none that can be used, with the model if its size is given."""
    file = find_tokenizer(folder)
    if file is None:
        raise ValueError(
            f"{folder}: neither tokenizer.json nor tiktoken.model, without which ids are no text"
        )
    tokenizer = load_tokenizer(file)
    if vocab_size is not None:
        check_ids(tokenizer, vocab_size)
    return tokenizer


def check_ids(tokenizer: Tokenizer, vocab_size: int) -> None:
    """ValueError if a text could have ids that the model has no row for."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{tokenizer.name} has ids up to {tokenizer.vocab_size - 1}; "
            f"allowed: below the model's vocab_size = {vocab_size}"
        )
