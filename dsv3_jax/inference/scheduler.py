"""Who is served next, where, and with which pages. No JAX.

Requests are admitted in the order of their coming, each to the device with the fewest texts (of
those, the one with most free pages). A text gets pages for what it has to read, and more as it
grows. Where they run out, the youngest text of the device gives up its own (preemption) and waits
again, before all that came later; what it has written is read again, as far as it is not still
known.
"""

from collections import deque
from collections.abc import Iterator

from dsv3_jax.inference.pages import Pages
from dsv3_jax.inference.requests import Scores, Text
from dsv3_jax.inference.settings import EngineConfig
from dsv3_jax.inference.statistics import Statistics


class Scheduler:
    """Texts on `shards` devices."""

    def __init__(
        self, settings: EngineConfig, shards: int, pages: int, statistics: Statistics
    ) -> None:
        self.settings, self.statistics = settings, statistics
        self.waiting: deque[Text] = deque()
        self.rows: list[list[Text | None]] = [[None] * settings.rows for _ in range(shards)]
        self._sizes = pages, settings.page_slots, settings.drafts
        self.forget()

    def forget(self) -> None:
        """No beginning of a text is known any more; nobody may hold a page."""
        self.pages = [Pages(*self._sizes) for _ in self.rows]

    @property
    def running(self) -> list[Text]:
        """Those that have a row, in the order of their coming."""
        found = [text for row in self.rows for text in row if text is not None]
        return sorted(found, key=lambda text: text.id)

    def admit(self) -> None:
        """Gives rows and pages to as many waiting texts, in order, as there is room for."""
        while self.waiting and any(self._seat(self.waiting[0], s) for s in self._best_shards()):
            self.waiting.popleft()

    def _best_shards(self) -> list[int]:
        def burden(shard: int) -> tuple[int, int]:
            texts = sum(text is not None for text in self.rows[shard])
            return texts, -self.pages[shard].free

        free = [shard for shard, row in enumerate(self.rows) if None in row]
        return sorted(free, key=burden)

    def _seat(self, text: Text, shard: int) -> bool:
        """Whether there was room for all that it has to read, and one token more."""
        pool, row = self.pages[shard], self.rows[shard]
        to_read = text.tokens[: len(text.request.prompt) + max(text.answered - 1, 0)]
        # Who has its prompt told of reads all of it itself.
        borrows = self.settings.share_prefixes and not text.is_scored
        borrowed = pool.borrow(to_read) if borrows else []
        own = pool.lend(pool.needed(len(text.tokens) + 1) - len(borrowed))
        if own is None:
            pool.take_back(borrowed)
            return False
        text.shard, text.row = shard, row.index(None)
        text.pages, text.borrowed = borrowed + own, len(borrowed)
        text.read, text.began = len(borrowed) * pool.page_slots, False
        text.scores = Scores() if text.is_scored else None
        row[text.row] = text
        return True

    def readers(self) -> list[list[Text]]:
        """Of every device, the first texts to have something read: at most one a micro-batch."""
        return [
            sorted((text for text in row if text and text.unread), key=lambda text: text.id)[
                : self.settings.prompt_microbatches
            ]
            for row in self.rows
        ]

    def goers(self) -> list[Text]:
        """Those that have all read."""
        return [text for text in self.running if not text.unread]

    def has_room(self, tokens: int) -> bool:
        """Whether `make_room` takes no text's pages away."""
        missing = [0] * len(self.pages)
        for text in self.goers():
            missing[text.shard] += self._missing(text, tokens)
        return all(n <= pool.free for n, pool in zip(missing, self.pages, strict=True))

    def make_room(self, tokens: int) -> list[Text]:
        """Pages for so many more tokens of each text that goes on. -> who still does."""
        for text in self.goers():
            while text.row >= 0 and not self._grown(text, tokens):
                self._give_up(max(self._of_shard(text.shard), key=lambda text: text.id))
        return self.goers()

    def _of_shard(self, shard: int) -> Iterator[Text]:
        return (text for text in self.rows[shard] if text is not None)

    def _grown(self, text: Text, tokens: int) -> bool:
        more = self.pages[text.shard].lend(self._missing(text, tokens))
        if more is None:
            return False
        text.pages += more
        return True

    def _missing(self, text: Text, tokens: int) -> int:
        needed = self.pages[text.shard].needed(min(len(text.tokens) + tokens, text.limit))
        return max(needed - len(text.pages), 0)

    def _give_up(self, text: Text) -> None:
        self.statistics.gave_up += 1
        self.leave(text)
        older = sum(other.id < text.id for other in self.waiting)
        self.waiting.insert(older, text)

    def leave(self, text: Text) -> None:
        """A text has ended, or waits again."""
        if text.row < 0:
            self.waiting.remove(text)
            return
        self.tell(text)
        self.pages[text.shard].take_back(text.pages)
        self.rows[text.shard][text.row] = None
        text.row, text.pages, text.borrowed, text.read = -1, [], 0, 0

    def tell(self, text: Text) -> None:
        """Others may borrow the pages that it has filled, and is 2 D tokens beyond with D drafts:
        so far back MTP modules may not have read yet, or have read drafts, and write again.
        """
        if self.settings.share_prefixes:
            settled = max(text.read - self.settings.drafts, 0)  # pages keep D more for themselves
            self.pages[text.shard].tell(text.tokens[:settled], text.pages)
