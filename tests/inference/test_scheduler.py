"""Texts are admitted in the order of their coming, and the youngest gives up its pages first."""

from dsv3_jax.inference.requests import Request, Text
from dsv3_jax.inference.scheduler import Scheduler
from dsv3_jax.inference.settings import EngineConfig
from dsv3_jax.inference.statistics import Statistics


def scheduler_of(pages: int, texts: int, shards: int = 2) -> Scheduler:
    """Two rows a device, pages of two tokens; texts of three tokens wait, which may grow to 20."""
    settings = EngineConfig(rows=2, page_slots=2, share_prefixes=False)
    made = Scheduler(settings, shards, pages, Statistics())
    for i in range(texts):
        made.waiting.append(Text(i, Request([1, 2, 3], 17), 20, [1, 2, 3]))
    return made


def read_all(scheduler: Scheduler) -> None:
    """As if every text that has a row were read, and its first token known."""
    for text in scheduler.running:
        text.read = len(text.tokens)
        text.tokens.append(4)


def ids(texts) -> list[int]:
    return [text.id for text in texts]


def test_texts_go_to_the_device_with_the_fewest_in_the_order_of_their_coming():
    scheduler = scheduler_of(pages=9, texts=5)
    scheduler.admit()
    assert [(text.id, text.shard) for text in scheduler.running] == [(0, 0), (1, 1), (2, 0), (3, 1)]
    assert ids(scheduler.waiting) == [4]
    scheduler.leave(scheduler.running[1])
    scheduler.admit()
    assert scheduler.running[-1].shard == 1


def test_a_later_text_does_not_pass_one_that_finds_no_pages():
    scheduler = scheduler_of(pages=3, texts=2, shards=1)
    scheduler.waiting.append(Text(2, Request([1], 9), 10, [1]))
    scheduler.admit()
    assert scheduler.pages[0].free == 1  # which the last one needs
    assert ids(scheduler.waiting) == [1, 2]


def test_the_youngest_give_up_and_wait_in_the_order_of_their_coming():
    """Each on its own device."""
    scheduler = scheduler_of(pages=4, texts=5)
    scheduler.admit()
    read_all(scheduler)
    assert scheduler.has_room(0)
    assert not scheduler.has_room(1)
    assert ids(scheduler.make_room(1)) == [0, 1]
    assert ids(scheduler.waiting) == [2, 3, 4]
    assert scheduler.statistics.gave_up == 2
    for pages in scheduler.pages:
        pages.check()
        assert pages.free == 1


def test_the_oldest_text_always_goes_on():
    scheduler = scheduler_of(pages=10, texts=2, shards=1)
    scheduler.admit()
    read_all(scheduler)
    while len(scheduler.running[0].tokens) < 20:
        assert scheduler.make_room(1)[0].id == 0
        for text in scheduler.goers():
            text.tokens.append(5)
            text.read = len(text.tokens) - 1
    assert ids(scheduler.waiting) == [1]
