"""Rewards as a user writes them, good ones and others; rated in processes of their own."""

import time


def early(attempt):
    """The share of the characters that stand in the first half of the alphabet of bytes."""
    return sum(ord(c) < 64 for c in attempt.text) / max(len(attempt.text), 1), "early characters"


def equal(attempt):
    return 0.5


def raises(attempt):
    raise RuntimeError("not today")


def nan(attempt):
    return float("nan")


def trouble(attempt):
    """Of every sort, and now and then none."""
    kind = sum(map(ord, attempt.text)) % 4
    if kind == 0:
        raise RuntimeError("not today")
    if kind == 1:
        return float("nan")
    if kind == 2:
        time.sleep(60)
    return len(attempt.text) / 10
