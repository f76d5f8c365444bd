"""Which samples of a set say again what an earlier one says (report 5.1 names no method).

Two texts are the same if they are after `normalised`; they are nearly the same if the Jaccard
similarity of their sets of word n-grams reaches a threshold. The search is exact: sets that are
that alike share one of their first few n-grams once these are sorted, the rarest first, so an index
of those first ones finds every pair that counts and few others (prefix filtering, Chaudhuri and
others 2006). An n-gram is held as its 64-bit hash. Memory grows with the n-grams of all texts: for
some 100,000 samples, not for millions.
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

# Chinese and Japanese have no blanks between words: each character is one.
_SIGNS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(rf"[{_SIGNS}]|[^\W{_SIGNS}]+|[^\w\s]")
# Full-width letters and half-width katakana, as East Asian texts mix them with the usual ones.
_WIDTHS = {
    code: int(of.split()[1], 16)
    for code in (0x3000, *range(0xFF01, 0xFFEF))
    if (of := unicodedata.decomposition(chr(code))).startswith(("<wide>", "<narrow>"))
}
_WORD = re.compile(rf"[{_SIGNS}]|[^\W{_SIGNS}]+")

Gram = tuple[str, ...]


def normalised(text: str) -> str:
    """In one width and one case, with single blanks. NFC, not NFKC, for which 10⁵ is 105."""
    text = unicodedata.normalize("NFC", text.translate(_WIDTHS))
    return " ".join(text.casefold().split())


def tokens(text: str) -> list[str]:
    """Words and single symbols of the normalised text: in mathematics a minus counts."""
    return _TOKEN.findall(normalised(text))


def words(text: str) -> list[str]:
    """Words alone, however they are written (NFKC): what an evaluation text is known by."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def grams(items: Sequence[str], size: int) -> Iterator[Gram]:
    """Runs of `size` items; of fewer items one run, all of them; of none nothing."""
    if not items:
        return
    last = max(len(items) - size, 0)
    for place in range(last + 1):
        yield tuple(items[place : place + size])


class KeptTexts:
    """Those of some texts that are kept, one after the other, and which of them another repeats."""

    def __init__(self, texts: Sequence[str], threshold: float, size: int) -> None:
        """Of n-grams of `size`; a threshold of 0: no two are alike."""
        self._plain = [normalised(text) for text in texts]
        self._first: dict[str, int] = {}
        self._threshold = threshold
        told = texts if threshold else []
        self._sets = [set(map(hash, grams(tokens(text), size))) for text in told]
        self._counts = Counter(gram for found in self._sets for gram in found)
        self._index: defaultdict[int, list[int]] = defaultdict(list)

    def keep(self, place: int) -> None:
        """From now on it can be repeated."""
        self._first.setdefault(self._plain[place], place)
        for gram in self._begin(place):
            self._index[gram].append(place)

    def same(self, place: int) -> int | None:
        """The first kept text that is the same."""
        return self._first.get(self._plain[place])

    def like(self, place: int) -> int | None:
        """The first kept text whose similarity reaches the threshold."""
        candidates = sorted({one for gram in self._begin(place) for one in self._index[gram]})
        reaches = (
            one
            for one in candidates
            if similarity(self._sets[place], self._sets[one]) >= self._threshold
        )
        return next(reaches, None)

    def _begin(self, place: int) -> list[int]:
        """Two sets that are alike have `least` in common, and so at least one of the first
        len(found) - least + 1 of either.
        """
        if not self._threshold:
            return []
        found, counts = self._sets[place], self._counts
        least = math.ceil(self._threshold * len(found) - 1e-9)
        return sorted(found, key=lambda gram: (counts[gram], gram))[: len(found) - least + 1]


def similarity(one: set[int], other: set[int]) -> float:
    """Jaccard: of all n-grams the share that both have; two empty sets are 0."""
    both = len(one & other)
    return both / (len(one) + len(other) - both) if both else 0.0
