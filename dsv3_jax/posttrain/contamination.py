"""Samples that show what a model will be examined on (decontamination; the report says that it was
done for pre-training data, and no method).

A text of an evaluation set is found in a sample that has a run of `size` of its words, 13 as in
GPT-3's paper (appendix C), punctuation and case aside. A shorter text is found only where it is all
that the prompt says: "Who wrote Hamlet?" must not be asked, and "42" may stand in an answer.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dsv3_jax.posttrain.duplicates import Gram, grams, words
from dsv3_jax.posttrain.json_lines import json_of, numbered_lines


class EvaluationTexts:
    """What must not be in samples."""

    def __init__(self, texts: Iterable[tuple[str, str]], size: int) -> None:
        """Of names, for reports, and texts."""
        self._size = size
        self._runs: dict[Gram, str] = {}
        self._whole: dict[Gram, str] = {}
        for name, text in texts:
            found = words(text)
            index = self._runs if len(found) >= size else self._whole
            for gram in grams(found, size):
                index.setdefault(gram, name)

    def within(self, prompt: str, others: Sequence[str]) -> str | None:
        """The name of an evaluation text that is in a prompt or in other texts; None if none is."""
        asked = words(prompt)
        whole = self._whole.get(tuple(asked))
        if whole is not None:
            return whole
        for found in (asked, *map(words, others)):
            for place in range(len(found) - self._size + 1):
                name = self._runs.get(tuple(found[place : place + self._size]))
                if name is not None:
                    return name
        return None


def read_evaluation_texts(files: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Names (file and line) and texts: of a `.jsonl` file every text in every line's object, of any
    other every line and every paragraph. ValueError, one line, for what is no UTF-8 or no JSON;
    OSError for a file that cannot be read.
    """
    for file in files:
        paragraph: list[str] = []
        for number, line in numbered_lines(file):
            where = f"{file} line {number}"
            if file.suffix.lower() == ".jsonl":
                found = _texts_of_line(where, line) if line.strip() else ()
            elif line.strip():
                paragraph.append(line)
                found = (line,)
            else:
                found, paragraph = (" ".join(paragraph),), []
            for text in found:
                yield where, text
        if paragraph:
            yield where, " ".join(paragraph)


def _texts_of_line(where: str, line: str) -> Iterator[str]:
    try:
        return _texts(json_of(line))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _texts(found: Any) -> Iterator[str]:
    if isinstance(found, str):
        yield found
    elif isinstance(found, dict | list):
        for value in found.values() if isinstance(found, dict) else found:
            yield from _texts(value)
