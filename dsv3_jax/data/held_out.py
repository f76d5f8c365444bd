"""Which documents are held out for validation (no section of the report).

The split goes by a hash of each document's text: adding files never moves old ones, and copies of
one file stay on one side. `survey` looks at all documents once and keeps none, `Survey.divide` goes
through them a second time; so a corpus need not fit in memory.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dsv3_jax.data.cache import TextsHash
from dsv3_jax.data.documents import Document, text_hash


@dataclass(frozen=True)
class Cut:
    """One document in two, where hashes leave a side empty (few documents): head and tail of the
    longest one fall on different sides, the others follow its tail if `from_start`, else its head.
    """

    place: int
    """Of the document among all"""
    at: int
    """Characters of the head"""
    from_start: bool


@dataclass(frozen=True)
class Survey:
    """What all documents are together, and how they are divided."""

    documents: int
    bytes: int
    """Of their texts in UTF-8"""
    content_hash: str
    """`content_hash` of the documents"""
    fraction: float
    cut: Cut | None

    def divide(self, documents: Iterable[Document]) -> Iterator[tuple[Document, bool]]:
        """Each of the surveyed documents, or a piece of it, and whether it is held out."""
        for place, document in enumerate(documents):
            if self.cut is None:
                yield document, is_held_out(document.text, self.fraction)
            elif place == self.cut.place:
                name, text, at = document.name, document.text, self.cut.at
                yield Document(f"{name}[:{at}]", text[:at]), False
                yield Document(f"{name}[{at}:]", text[at:]), True
            else:
                yield document, self.cut.from_start


def is_held_out(text: str, fraction: float) -> bool:
    """Whether the hash of a text, read as a number in [0, 1), is below the fraction."""
    # 53 bits: what a float holds exactly, so that rounding never reaches 1.0.
    return (text_hash(text) >> 11) / 2**53 < fraction


def survey(documents: Iterable[Document], fraction: float) -> Survey:
    """Counts, identity and division of the documents.

    Where hashes leave a side empty, the longest document is cut at a line, so that each side gets
    its share of the text as nearly as one cut can give it. ValueError for a fraction outside (0, 1)
    or if there is nothing to divide.
    """
    if not 0 < fraction < 1:
        raise ValueError(
            f"data.validation_fraction is {fraction}; allowed: more than 0, less than 1"
        )
    count = held_out = num_bytes = 0
    digest = TextsHash()
    lengths = _Lengths()
    for document in documents:
        data = document.text.encode()
        digest.add(data)
        lengths.add(document.text)
        num_bytes += len(data)
        count += 1
        held_out += is_held_out(document.text, fraction)
    cut = None
    if held_out in (0, count):
        cut = lengths.cut(1 - fraction, from_start=held_out > 0)
    return Survey(count, num_bytes, digest.hexdigest(), fraction, cut)


class _Lengths:
    """Of a sequence of texts in characters; only the longest text is kept."""

    def __init__(self) -> None:
        self.count = self.total = 0
        self.longest, self.place = "", 0

    def add(self, text: str) -> None:
        if len(text) > len(self.longest):
            self.longest, self.place = text, self.count
        self.count += 1
        self.total += len(text)

    def cut(self, train_share: float, from_start: bool) -> Cut:
        if len(self.longest) < 2:
            raise ValueError(
                f"data.source: {self.total} characters in {self.count} documents; "
                "allowed: enough text to divide into training and validation"
            )
        others_first = 0 if from_start else self.total - len(self.longest)
        wanted = round(train_share * self.total) - others_first
        return Cut(self.place, _cut_point(self.longest, wanted), from_start)


def _cut_point(text: str, wanted: int) -> int:
    """Where a line starts nearest to `wanted`, never at an end of the text.

    `wanted` itself, within the text, where lines are so long that none starts within half of it.
    """
    wanted = min(max(wanted, 1), len(text) - 1)
    before = text.rfind("\n", 0, wanted) + 1
    after = text.find("\n", wanted - 1) + 1
    near = [
        start
        for start in (before, after)
        if 0 < start < len(text) and abs(start - wanted) <= len(text) / 2
    ]
    return min(near, key=lambda start: abs(start - wanted), default=wanted)
