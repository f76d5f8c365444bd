"""Duplicates as a slow look at all pairs finds them."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.posttrain.duplicates import (
    KeptTexts,
    grams,
    normalised,
    similarity,
    tokens,
    words,
)

TEXTS = st.lists(st.lists(st.sampled_from("abcde"), max_size=12).map(" ".join), max_size=10)


def exact_duplicates(texts: Sequence[str]) -> list[int | None]:
    """Of each text the first one that is the same, where all others are kept."""
    return repeats(texts, KeptTexts.same, 0, 1)


def near_duplicates(texts: Sequence[str], threshold: float, size: int) -> list[int | None]:
    """Of each text the first kept one that is alike, where all others are kept."""
    return repeats(texts, KeptTexts.like, threshold, size)


def repeats(texts, look, threshold, size):
    kept, found = KeptTexts(texts, threshold, size), []
    for place in range(len(texts)):
        found.append(look(kept, place))
        if found[-1] is None:
            kept.keep(place)
    return found


def slow_near(texts, threshold, size):
    """The definition: every text against every kept one before it."""
    sets = [
        {tuple(found[i : i + size]) for i in range(len(found)) if i + size <= len(found) or i == 0}
        for found in (text.split() for text in texts)
    ]
    same = []
    for place, mine in enumerate(sets):
        kept = (other for other in range(place) if same[other] is None)
        alike = (
            other
            for other in kept
            if mine & sets[other] and len(mine & sets[other]) / len(mine | sets[other]) >= threshold
        )
        same.append(next(alike, None))
    return same


@settings(max_examples=100, deadline=None)
@given(TEXTS, st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 0.6, 0.75, 0.8, 1.0]), st.integers(1, 4))
def test_near_duplicates_are_those_that_all_pairs_show(texts, threshold, size):
    assert near_duplicates(texts, threshold, size) == slow_near(texts, threshold, size)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.text("aB \n\tÄä\uff21", max_size=3), max_size=12))
def test_exact_duplicates_are_the_first_text_with_the_same_normal_form(texts):
    same = [normalised(text) for text in texts]
    slow = [None if same.index(one) == place else same.index(one) for place, one in enumerate(same)]
    assert exact_duplicates(texts) == slow


def test_width_case_and_blanks_do_not_count_and_symbols_do():
    assert exact_duplicates(["x  =\n1", "\uff38 = 1 ", "x = 2", "x == 1"]) == [None, 0, None, None]
    assert near_duplicates(["x = 1 - 2", "x = 1 + 2"], 1.0, 2) == [None, None]


def test_what_only_looks_like_another_text_is_not_the_same():
    for one, other in (("10⁵", "105"), ("x²", "x2"), ("ℝ", "R"), ("½", "1⁄2")):
        assert exact_duplicates([one, other]) == [None, None]
        assert near_duplicates([one, other], 0.1, 1) == [None, None]
    assert exact_duplicates(["ｶﾞ１％", "ガ1%", "e\u0301", "É"]) == [None, 0, None, 2]


def test_only_what_is_kept_is_repeated():
    kept = KeptTexts(["a b c", "a b c d", "A b c", "a b c d"], 0.6, 1)
    assert [kept.same(2), kept.like(1)] == [None, None]
    kept.keep(1)
    assert [kept.same(2), kept.like(2), kept.same(3)] == [None, 1, 1]


def test_words_are_characters_where_there_are_no_blanks():
    assert words("机器 learning, isn't") == ["机", "器", "learning", "isn", "t"]
    assert tokens("a-1") == ["a", "-", "1"]
    assert [*grams(words("机器学习"), 2)] == [("机", "器"), ("器", "学"), ("学", "习")]
    assert [*grams([], 3)] == []
    assert [*grams(["a"], 3)] == [("a",)]


def test_empty_texts_are_alike_exactly_and_not_nearly():
    assert exact_duplicates(["", " "]) == [None, 0]
    assert near_duplicates(["", ""], 0.1, 2) == [None, None]


@pytest.mark.parametrize(("one", "other", "share"), [("ab", "ab", 1), ("abc", "bcd", 0.5)])
def test_similarity_is_jaccards(one: str, other: str, share: float):
    assert similarity(set(zip(one)), set(zip(other))) == share


def test_a_boilerplate_that_all_share_makes_no_duplicates_and_few_comparisons(monkeypatch):
    from dsv3_jax.posttrain import duplicates

    texts = [f"translate this into german please {n} {n + 1} {n + 2} {n * n}" for n in range(200)]
    compared = itertools.count()
    real = duplicates.similarity
    monkeypatch.setattr(duplicates, "similarity", lambda *sets: (next(compared), real(*sets))[1])
    assert near_duplicates(texts, 0.8, 3) == [None] * 200
    assert next(compared) < 200  # of 19,900 pairs
