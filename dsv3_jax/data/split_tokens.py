"""Random split of tokens that join punctuation with line ends (report 4.1).

Such a token hides where a line ends: a prompt that stops before the line end, as few-shot prompts
do, is cut where training text never is. A share of their occurrences (unpublished) is therefore
written as two: the punctuation, then the line ends. Which ones is decided by hash of (text of the
document, occurrence), so it is the same in every run. Bytes stay the same. Held-out text is left
whole, so that its bits per byte compare between runs.
"""

import re
import unicodedata

import numpy as np

from dsv3_jax.data.documents import text_hash
from dsv3_jax.data.hashing import unit, words
from dsv3_jax.data.tokenizer import Tokenizer

# As the tokenizer's rule for punctuation, but with at least one line end.
_JOINED = re.compile(r"( ?[^\s]+)([\r\n]+)")


class TokenSplitter:
    """Splits occurrences of joined tokens with one probability.

    Attributes:
        rate: probability of a split, 0 to 1.
        halves: id of each joined token -> ids of its punctuation and of its line ends.
    """

    def __init__(self, tokenizer: Tokenizer, rate: float) -> None:
        assert 0 <= rate <= 1, rate
        self.rate = rate
        self.halves = _halves(tokenizer)
        self._is_joined_V = np.zeros(tokenizer.vocab_size, bool)
        self._is_joined_V[list(self.halves)] = True

    def split(self, text: str, ids: np.ndarray) -> np.ndarray:
        """The ids of a text, int32 [N], with some joined tokens in two, int32 [N + splits]."""
        places = np.flatnonzero(self._is_joined_V[ids])
        places = places[unit(words(text_hash(text), len(places))) < self.rate]
        pieces = np.split(ids, np.sort(np.concatenate([places, places + 1])))
        # Every other piece is a single joined token.
        pieces[1::2] = [self.halves[int(piece[0])] for piece in pieces[1::2]]
        return np.concatenate(pieces)


def _halves(tokenizer: Tokenizer) -> dict[int, np.ndarray]:
    """Joined tokens whose halves have the same bytes as the whole."""
    found = {}
    for token_id, data in enumerate(tokenizer.token_bytes):
        parts = _parts(data)
        if parts is None:
            continue
        ids = np.concatenate(tokenizer.encode_batch(parts))
        if b"".join(tokenizer.token_bytes[i] for i in ids.tolist()) == data:
            found[token_id] = ids
    return found


def _parts(data: bytes) -> tuple[str, str] | None:
    """Punctuation and line ends of a token that joins them, else None."""
    try:
        match = _JOINED.fullmatch(data.decode())
    except UnicodeDecodeError:
        return None
    if match is None:
        return None
    marks, ends = match.groups()
    is_marks = all(unicodedata.category(mark)[0] in "PS" for mark in marks.removeprefix(" "))
    return (marks, ends) if is_marks else None
