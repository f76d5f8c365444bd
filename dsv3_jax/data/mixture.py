"""Several sources by weight (report 4.1; its mixture is unpublished).

Row i of a mixture is row j of a source s, both a function of i. Each source goes through its own
epochs, row by row, so none of its rows is lost or repeated. After any number k of rows, a source of
share w has given more than w·k − 1 and fewer than w·k + 1 of them. grain's `MapDataset.mix` rounds
shares (1 : 1.001 to 1 : 1) and goes beyond that bound (by 0.05 of a row for 3 : 5 : 11 : 2), so the
choice is ours: a schedule of one period, in which each source's next row has a first place where it
is not too early and a last one where it is not too late, and the most urgent row goes first. Such a
schedule exists for all shares (Tijdeman 1980), and earliest deadline first finds it.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from dsv3_jax.data.packing import Row, Rows

# Weights of up to five digits are exact, others are rounded; a period's table takes 1 MB.
MAX_PERIOD = 100_000


class Mixture:
    """Rows of several sources as one endless sequence, with the interface of `Rows`.

    ValueError if no weight is above 0.
    """

    def __init__(self, sources: Sequence[Rows], weights: Sequence[float]) -> None:
        assert len({rows.length for rows in sources}) == 1, "rows of several lengths"
        self.sources = sources
        self.parts = parts_of(weights)
        self.length = sources[0].length
        self._source_of, self._rank_of = _period(self.parts)

    def __len__(self) -> int:
        """Rows in the first epoch of all sources that are read."""
        return sum(len(rows) for rows, part in zip(self.sources, self.parts, strict=True) if part)

    def __getitem__(self, index: int) -> Row:
        source, row = self.locate(index)
        return self.sources[source][row]

    def names_of(self, index: int) -> list[str]:
        """Names of the documents whose tokens a row predicts, in its order."""
        source, row = self.locate(index)
        return self.sources[source].names_of(row)

    def locate(self, index: int) -> tuple[int, int]:
        """(source, row of that source) of a row."""
        assert index >= 0, index
        period, place = divmod(index, len(self._source_of))
        source = int(self._source_of[place])
        return source, period * self.parts[source] + int(self._rank_of[place])


def parts_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Rows of each source in one period: weights as written in decimal, in whole numbers.

    Sums above `MAX_PERIOD` are rounded to about that many parts, at least one for a weight above 0.
    ValueError if the weights sum to 0.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    total = sum(exact)
    if total == 0:
        raise ValueError("data.weights sum to 0; allowed: at least one above 0")
    period = math.lcm(*((weight / total).denominator for weight in exact))
    if period > MAX_PERIOD:
        return tuple(max(round(weight / total * MAX_PERIOD), weight > 0) for weight in exact)
    return tuple(int(weight / total * period) for weight in exact)


def _period(parts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(source, how many rows of it came before) at each place of a period; int16 and int32.

    With W rows in a period, a source of p parts is early at place k (from 0) with j rows before if
    j·W >= p·(k + 1), and late after place ceil((j + 1)·W / p) - 1.
    """
    total = sum(parts)
    source_of, rank_of = np.zeros(total, np.int16), np.zeros(total, np.int32)
    counts = [0] * len(parts)
    read = [source for source, part in enumerate(parts) if part]
    deadlines = {source: -(-total // parts[source]) for source in read}
    for place in range(total):
        due = [s for s in read if counts[s] * total < parts[s] * (place + 1)]
        source = min(due, key=deadlines.__getitem__)
        assert deadlines[source] > place, (parts, place)
        source_of[place], rank_of[place] = source, counts[source]
        counts[source] += 1
        deadlines[source] = -(-(counts[source] + 1) * total // parts[source])
    return source_of, rank_of
