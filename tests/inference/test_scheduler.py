"""Texts are seated in the order of their coming, and where pages run out the youngest give way."""

from dataclasses import replace

import numpy as np
import pytest

from dsv3_jax.inference.requests import Request, Text
from dsv3_jax.inference.scheduler import Scheduler
from dsv3_jax.inference.settings import EngineConfig
from dsv3_jax.inference.statistics import Statistics

SIZES = EngineConfig(rows=2, page_slots=4)


def scheduler_of(pages: int, shards: int = 1, **changes: object) -> Scheduler:
    return Scheduler(replace(SIZES, **changes), shards, pages, Statistics())


def come(scheduler: Scheduler, number: int, prompt: list[int], limit: int = 64) -> Text:
    """A text that waits."""
    request = Request(prompt, limit - len(prompt))
    text = Text(number, request, limit, list(prompt))
    scheduler.waiting.append(text)
    return text


def read(scheduler: Scheduler, text: Text) -> None:
    """All of the prompt; the first token of an answer is 9."""
    text.read += text.unread
    scheduler.tell(text)
    text.tokens.append(9)


def seats(scheduler: Scheduler) -> list[list[int | None]]:
    return [[text and text.id for text in row] for row in scheduler.rows]


def test_texts_are_seated_in_order_where_the_fewest_are_then_where_most_pages_are_free():
    scheduler = scheduler_of(4, shards=2)
    for number, length in enumerate((7, 2, 2, 2, 2)):
        come(scheduler, number, [number] * length)
    scheduler.admit()
    # The third goes where three pages are free and not two.
    assert seats(scheduler) == [[0, 3], [1, 2]]
    assert [text.id for text in scheduler.waiting] == [4]
    assert [text.id for text in scheduler.running] == [0, 1, 2, 3]


def test_nobody_overtakes_a_text_that_finds_no_room():
    scheduler = scheduler_of(4)
    come(scheduler, 0, [1] * 6)
    come(scheduler, 1, [2] * 9)
    come(scheduler, 2, [3])
    scheduler.admit()
    assert seats(scheduler) == [[0, None]]
    assert [text.id for text in scheduler.waiting] == [1, 2]
    assert scheduler.pages[0].free == 2


@pytest.mark.parametrize(("length", "pages"), [(1, 1), (3, 1), (4, 2), (7, 2), (8, 3)])
def test_a_seat_has_pages_for_the_prompt_and_one_token_more(length: int, pages: int):
    scheduler = scheduler_of(8)
    text = come(scheduler, 0, [1] * length)
    scheduler.admit()
    assert len(text.pages) == pages
    assert (text.read, text.borrowed, text.unread) == (0, 0, length)


def test_what_is_borrowed_is_given_back_where_there_is_no_room_for_the_rest():
    scheduler = scheduler_of(3)
    first = come(scheduler, 0, [1] * 6)
    scheduler.admit()
    read(scheduler, first)
    come(scheduler, 1, [1] * 13)
    scheduler.admit()
    assert seats(scheduler) == [[0, None]]
    scheduler.leave(first)
    assert scheduler.pages[0].free == 3


@pytest.mark.parametrize("share", [True, False])
def test_a_text_borrows_what_others_have_read_and_reads_the_rest(share: bool):
    scheduler = scheduler_of(8, share_prefixes=share)
    first = come(scheduler, 0, [1] * 9)
    scheduler.admit()
    read(scheduler, first)
    second = come(scheduler, 1, [1] * 9)
    scheduler.admit()
    assert second.pages[:2] == first.pages[:2] or not share
    assert (second.borrowed, second.read, second.unread) == ((2, 8, 1) if share else (0, 0, 9))


def test_of_every_device_the_oldest_texts_are_read_first():
    scheduler = scheduler_of(8, shards=2)
    texts = [come(scheduler, i, [i]) for i in range(4)]
    scheduler.admit()
    assert seats(scheduler) == [[0, 2], [1, 3]]
    assert [[text.id for text in row] for row in scheduler.readers()] == [[0], [1]]
    read(scheduler, texts[0])
    assert [[text.id for text in row] for row in scheduler.readers()] == [[2], [1]]
    assert scheduler.goers() == [texts[0]]
    scheduler.settings = replace(SIZES, prompt_microbatches=2)
    assert [[text.id for text in row] for row in scheduler.readers()] == [[2], [1, 3]]


def test_texts_grow_up_to_their_limit_and_no_further():
    scheduler = scheduler_of(8)
    text = come(scheduler, 0, [1] * 4, limit=9)
    scheduler.admit()
    read(scheduler, text)
    for tokens, pages in ((1, 2), (3, 2), (4, 3), (30, 3)):
        assert scheduler.make_room(tokens) == [text]
        assert len(text.pages) == pages


def test_the_youngest_gives_its_pages_up_and_waits_first_in_the_queue():
    scheduler = scheduler_of(4, share_prefixes=False)
    old, young = (come(scheduler, i, [i] * 6) for i in range(2))
    come(scheduler, 2, [2])
    scheduler.admit()
    read(scheduler, old)
    read(scheduler, young)
    assert scheduler.has_room(1)
    assert not scheduler.has_room(2)
    assert scheduler.make_room(2) == [old]
    assert len(old.pages) == 3
    assert [text.id for text in scheduler.waiting] == [1, 2]
    assert (young.row, young.pages, young.borrowed, young.read) == (-1, [], 0, 0)
    assert young.unread == 6  # the newest token is not read
    assert scheduler.statistics.gave_up == 1
    scheduler.admit()
    assert seats(scheduler) == [[0, None]]


def test_a_device_without_pages_takes_none_of_another():
    scheduler = scheduler_of(2, shards=2)
    texts = [come(scheduler, i, [i] * 5) for i in range(2)]
    scheduler.admit()
    for text in texts:
        read(scheduler, text)
    texts[0].limit = 7
    assert not scheduler.has_room(8)
    texts[1].limit = 8
    assert scheduler.has_room(8)
    assert scheduler.make_room(8) == texts


def test_texts_that_leave_while_they_wait_or_are_read_leave_nothing():
    scheduler = scheduler_of(4)
    seated, waiting = come(scheduler, 0, [1] * 13), come(scheduler, 1, [2] * 13)
    scheduler.admit()
    seated.read = 5  # in the middle of its prompt
    scheduler.leave(waiting)
    scheduler.leave(seated)
    assert seats(scheduler) == [[None, None]]
    assert not scheduler.waiting
    assert scheduler.pages[0].free == 4
    assert scheduler.pages[0].borrow([1] * 13) == [0]  # of four pages one had been filled


@pytest.mark.parametrize("drafts", [0, 1, 2])
def test_pages_are_told_when_mtp_has_read_them_with_the_tokens_behind(drafts: int):
    """A module reads up to D tokens ahead, and up to D positions after the main model."""
    scheduler = scheduler_of(8, drafts=drafts)
    text = come(scheduler, 0, list(range(20)))
    scheduler.admit()
    told = []
    for text.read in range(13):
        scheduler.tell(text)
        pages = scheduler.pages[0].borrow(list(range(20)))
        told.append(len(pages))
        scheduler.pages[0].take_back(pages)
    assert np.flatnonzero(np.diff(told)).tolist() == [
        n - 1 + 2 * drafts for n in (4, 8, 12) if n + 2 * drafts <= 12
    ]


def test_a_text_that_waits_again_reads_all_but_the_newest_token_and_borrows_no_end():
    """Or no chunk would be left to go on from."""
    scheduler = scheduler_of(8)
    text = come(scheduler, 0, [1] * 4)
    scheduler.admit()
    read(scheduler, text)
    text.tokens += [2, 3, 4, 5]
    text.read, text.began = 8, True
    scheduler.make_room(1)
    scheduler.leave(text)
    scheduler.waiting.append(text)
    scheduler.admit()
    assert (text.borrowed, text.read, text.unread, text.began) == (1, 4, 4, False)


def test_growing_texts_of_one_device_share_its_room_and_take_nothing_from_another():
    scheduler = scheduler_of(5, shards=2)
    texts = [come(scheduler, i, [i] * 6) for i in range(4)]
    scheduler.admit()
    for text in texts:
        read(scheduler, text)
    scheduler.leave(texts[1])
    assert seats(scheduler) == [[0, 2], [None, 3]]
    assert not scheduler.has_room(4)  # one page is free, and two are missing
    assert scheduler.make_room(4) == [texts[0], texts[3]]
    assert scheduler.waiting[0] is texts[2]


def test_those_who_give_up_on_several_devices_wait_in_the_order_of_their_coming():
    scheduler = scheduler_of(4, shards=2, page_slots=2, share_prefixes=False)
    texts = [come(scheduler, i, [1, 2, 3], limit=20) for i in range(5)]
    scheduler.admit()
    for text in texts[:4]:
        read(scheduler, text)
    assert scheduler.make_room(1) == texts[:2]
    assert list(scheduler.waiting) == texts[2:]
    assert scheduler.statistics.gave_up == 2
    for pages in scheduler.pages:
        pages.check()
        assert pages.free == 1


def test_the_oldest_text_always_goes_on():
    scheduler = scheduler_of(10, page_slots=2, share_prefixes=False)
    oldest, youngest = (come(scheduler, i, [1, 2, 3], limit=20) for i in range(2))
    scheduler.admit()
    for text in (oldest, youngest):
        read(scheduler, text)
    while len(oldest.tokens) < 20:
        assert scheduler.make_room(1)[0] is oldest
        for text in scheduler.goers():
            text.tokens.append(5)
            text.read = len(text.tokens) - 1
    assert list(scheduler.waiting) == [youngest]
