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
_WORD = re.compile(rf"[{_SIGNS}]|[^\W{_SIGNS}]+")

Gram = tuple[str, ...]


def normalised(text: str) -> str:
    """In one width and one case (Unicode's NFKC and case folding), with single blanks."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def tokens(text: str) -> list[str]:
    """Words and single symbols of the normalised text: in mathematics a minus counts."""
    return _TOKEN.findall(normalised(text))


def words(text: str) -> list[str]:
    """Words alone."""
    return _WORD.findall(normalised(text))


def grams(items: Sequence[str], size: int) -> Iterator[Gram]:
    """Runs of `size` items; of fewer items one run, all of them; of none nothing."""
    if not items:
        return
    last = max(len(items) - size, 0)
    for place in range(last + 1):
        yield tuple(items[place : place + size])


def exact_duplicates(texts: Sequence[str]) -> list[int | None]:
    """For each text the first one that is the same; None for the first ones."""
    first: dict[str, int] = {}
    found = (first.setdefault(normalised(text), place) for place, text in enumerate(texts))
    return [None if same == place else same for place, same in enumerate(found)]


def near_duplicates(texts: Sequence[str], threshold: float, size: int) -> list[int | None]:
    """For each text the first kept one whose similarity reaches the threshold, above 0 and at most
    1; None for those that are kept themselves.
    """
    sets = [set(map(hash, grams(tokens(text), size))) for text in texts]
    counts = Counter(gram for found in sets for gram in found)
    index: defaultdict[int, list[int]] = defaultdict(list)
    same: list[int | None] = []
    for place, found in enumerate(sets):
        # Two sets as alike as that have `least` in common, and so at least one of the first
        # len(found) - least + 1 of either.
        least = math.ceil(threshold * len(found) - 1e-9)
        begin = sorted(found, key=lambda gram: (counts[gram], gram))[: len(found) - least + 1]
        candidates = sorted({other for gram in begin for other in index[gram]})
        alike = (one for one in candidates if similarity(found, sets[one]) >= threshold)
        same.append(next(alike, None))
        if same[-1] is None:
            for gram in begin:
                index[gram].append(place)
    return same


def similarity(one: set[int], other: set[int]) -> float:
    """Jaccard: of all n-grams the share that both have; two empty sets are 0."""
    both = len(one & other)
    return both / (len(one) + len(other) - both) if both else 0.0
