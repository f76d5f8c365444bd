"""Pages are lent, borrowed and taken back, and none is ever lost or in two hands."""

import numpy as np
import pytest

from dsv3_jax.inference.pages import Pages


def test_a_text_borrows_the_whole_pages_of_a_beginning_that_is_known():
    pages = Pages(8, 4)
    text = list(range(10))
    own = pages.lend(3)
    pages.tell(text, own)
    assert pages.borrow(text) == own[:2]  # the third is not full
    assert pages.borrow([*text[:8], 77, 78]) == own[:2]
    assert pages.borrow([*text[:4], 99, *text[5:8], 1]) == own[:1]
    assert pages.borrow([99, *text[1:]]) == []
    pages.check()


def test_the_last_token_is_never_borrowed():
    pages = Pages(8, 4)
    pages.tell(list(range(8)), own := pages.lend(2))
    assert pages.borrow(list(range(8))) == own[:1]
    assert pages.borrow(list(range(9))) == own


def test_with_modules_that_look_ahead_the_tokens_behind_a_page_must_be_alike_too():
    pages = Pages(8, 4, ahead=2)
    text = list(range(10))
    pages.tell(text[:9], own := pages.lend(3))
    assert pages.borrow(text) == own[:1]  # nobody has seen two tokens behind the second
    pages.tell(text, own)
    assert pages.borrow(text) == own[:2]
    assert pages.borrow([*text[:9], 99]) == own[:1]
    assert pages.borrow([*text[:5], 99, 98]) == []
    assert pages.borrow(text[:5]) == []
    pages.check()


def test_equal_pages_behind_different_beginnings_are_different():
    pages = Pages(8, 2)
    pages.tell([1, 2, 5, 6], pages.lend(2))
    assert len(pages.borrow([1, 2, 5, 6, 0])) == 2
    assert pages.borrow([3, 4, 5, 6, 0]) == []


def test_too_many_pages_are_not_lent_and_nothing_changes():
    pages = Pages(4, 2)
    held = pages.lend(3)
    assert pages.lend(2) is None
    assert pages.free == 1
    pages.take_back(held)
    assert pages.free == 4
    with pytest.raises(ValueError, match=f"page {held[-1]} is taken back, and nobody holds it"):
        pages.take_back(held)


def test_what_nobody_holds_stays_known_until_its_room_is_needed_ends_of_texts_first():
    pages = Pages(3, 2)
    own = pages.lend(3)
    pages.tell([1, 2, 3, 4, 5, 6], own)
    pages.take_back(own)
    assert pages.free == 3
    taken = pages.lend(1)
    assert taken == own[2:]
    assert pages.borrow([1, 2, 3, 4, 5, 6, 7]) == own[:2]
    pages.check()


def test_a_second_copy_of_a_beginning_is_not_known_but_the_first_is():
    pages = Pages(4, 2)
    one, two = pages.lend(1), pages.lend(1)
    pages.tell([1, 2], one)
    pages.tell([1, 2], two)
    assert pages.borrow([1, 2, 3]) == one
    pages.take_back(two)
    pages.check()


def test_whatever_is_lent_borrowed_and_taken_back_a_page_holds_what_its_borrower_reads():
    """Random texts of few tokens, so that many begin alike, against contents written down."""
    rng = np.random.default_rng(0)
    pages, texts, content, borrowings = Pages(12, 2), [], {}, 0
    for _ in range(3000):
        if texts and rng.random() < 0.5:
            tokens, held = texts.pop(rng.integers(len(texts)))
            pages.tell(tokens, held)
            pages.take_back(held)
        else:
            tokens = rng.integers(0, 2, rng.integers(1, 9)).tolist()
            borrowed = pages.borrow(tokens)
            for i, page in enumerate(borrowed):
                assert content[page] == tokens[: 2 * i + 2]
            own = pages.lend(pages.needed(len(tokens)) - len(borrowed))
            if own is None:
                pages.take_back(borrowed)
            else:
                assert not {page for _, held in texts for page in held} & set(own)
                for i, page in enumerate(own, start=len(borrowed)):
                    content[page] = tokens[: 2 * i + 2]
                texts.append((tokens, borrowed + own))
                borrowings += len(borrowed)
        pages.check()
        assert pages.free == 12 - len({page for _, held in texts for page in held})
    assert borrowings > 300
