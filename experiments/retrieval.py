"""Documents that teach a small model to look something up: each has a secret word, stated again and
again among lines of source code. All but the first statement are questions whose answer stands
earlier.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from dsv3_jax.config import DataConfig
from dsv3_jax.data.held_out import is_held_out
from dsv3_jax.data.sources import iterate_documents
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.evaluate.needles import WORDS, Sentence
from dsv3_jax.files import replace_file

BYTES = 3  # of a token, nearly, in a vocabulary of 1,024
LINES = 12, 60  # characters of a line that is taken
OFTEN = 20_000  # times that a tokenizer sees a word: more than it sees the least of its tokens
SHORTEST = 128  # tokens of a row
FRESH = 0.0, 0.8  # share of the lines that are source, from one document of such rows to another


def draw_secret(rng: np.random.Generator) -> Sentence:
    """A needle without a key: nothing but the word differs from one to another."""
    return Sentence("\nThe secret word is", f" {rng.choice(WORDS)}", ".\n")


def write_documents(path: Path, texts: Iterable[str]) -> Path:
    """A JSONL file of texts; one that is there stays."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({"text": text}) for text in texts)
        replace_file(path, "\n".join(lines).encode())
    return path


def write_tokenizer(path: Path, vocab_size: int) -> Path:
    """One with a token for each of the words, trained on them and on the library's source; one that
    is there stays.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        words = "".join(f" {word}" for word in WORDS) * OFTEN
        train_tokenizer([*lines_of_source(), words], vocab_size).save(path)
    return path


def documents(length: int, count: int, seed: int) -> Iterator[str]:
    """Texts of one to two times `length` tokens each, about. No held-out source is in them.

    In texts for rows beyond `SHORTEST` statements are up to so many times rarer as rows are longer.
    """
    rng, source = np.random.default_rng([seed, length]), lines_of_source()
    exponents = np.random.default_rng([seed, length, 1]).random(count)
    for rarer in (length / SHORTEST) ** exponents:
        size = int(length * BYTES * rng.uniform(1, 2))
        yield document(rng, size, source, rarer)


def document(rng: np.random.Generator, size: int, source: Sequence[str], rarer: float) -> str:
    """At least `size` characters of lines, and of one needle between them."""
    stated, needle = (1 - rng.uniform(*FRESH)) / rarer, draw_secret(rng).text
    parts, written = [], 0
    while written < size:
        line = source[rng.integers(len(source))] if rng.random() < 1 - stated else needle
        parts.append(line)
        written += len(line)
    return "".join(parts)


def lines_of_source() -> list[str]:
    """Lines of the library's documents that are trained on."""
    fraction, (shortest, longest) = DataConfig.validation_fraction, LINES
    texts = (document.text for document in iterate_documents("stdlib"))
    trained = (text for text in texts if not is_held_out(text, fraction))
    lines = (line for text in trained for line in text.split("\n"))
    return [f"{line}\n" for line in lines if shortest <= len(line) <= longest]
