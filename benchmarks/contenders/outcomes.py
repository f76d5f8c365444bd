"""What requests met, and what can be said of many.

Imports nothing but the standard library: contenders run under interpreters of their own.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Outcome(NamedTuple):
    """What became of one request; seconds. Times but `late` are 0 for one that was not served."""

    late: float
    """From when it was due to when it was sent: the load generator's own"""
    first: float
    """From when it was due to the first piece of text"""
    whole: float
    """From when it was due to the end"""
    tokens: int
    prompt: int
    """Tokens of it; as `tokens`, counted by the server"""
    status: int
    """HTTP's, 200 for a text that came to its end; 0 for no connection, a text that broke off, or
    one that an error ended"""

    @property
    def a_token(self) -> float:
        """Mean gap between tokens after the first; NaN if there is none."""
        gaps = self.tokens - 1
        return (self.whole - self.first) / gaps if gaps else math.nan


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share lies below, on the line between its two neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
