"""Which page of a pool belongs to whom: lending, sharing of prefixes (prefix caching), taking back.

Plain Python, no JAX. A page that is full of a text's beginning is known by that beginning (all the
tokens up to its end); another text that begins so borrows it. A page that nobody holds any more
stays known until its room is needed; the one unused for longest goes first.

MTP modules look ahead: what D of them keep of a position depends on the D tokens behind it. So
with `ahead` = D a page is known by so many tokens more than it holds, and who borrows it finds
there what it would have written itself.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import count as serials
from typing import NamedTuple


class Known(NamedTuple):
    """A page known by the beginning that it ends; `serial` is that beginning's, never used again.

    What a page is looked up by is the serial of the beginning before it and its own tokens: exact,
    where a hash could be made to collide with somebody else's text.
    """

    page: int
    serial: int


class Pages:
    """The pages of one device's pools, the same ones in every layer."""

    def __init__(self, count: int, page_slots: int, ahead: int = 0) -> None:
        self.count, self.page_slots, self.ahead = count, page_slots, ahead
        self._blank = list(range(count - 1, -1, -1))  # known by no beginning, held by nobody
        self._holders = [0] * count
        self._idle: OrderedDict[int, None] = OrderedDict()  # known, held by nobody; oldest first
        self._known: dict[tuple, Known] = {}
        self._name_of: dict[int, tuple] = {}
        self._serials = serials(1)

    @property
    def free(self) -> int:
        """Pages that can be lent."""
        return len(self._blank) + len(self._idle)

    def needed(self, slots: int) -> int:
        """Pages for so many slots."""
        return -(-slots // self.page_slots)

    def lend(self, count: int) -> list[int] | None:
        """So many pages of one holder, contents undefined; None, and nothing lent, for too many."""
        if count > self.free:
            return None
        pages = []
        for _ in range(count):
            if not self._blank:
                self._forget(self._idle.popitem(last=False)[0])
            pages.append(self._blank.pop())
            self._holders[pages[-1]] = 1
        return pages

    def take_back(self, pages: Sequence[int]) -> None:
        """One holder less of each, of a text from its beginning. The last ones become idle first,
        and go first: a shorter beginning is of use to more texts.
        """
        for page in reversed(pages):
            if not self._holders[page]:
                raise ValueError(f"page {page} is taken back, and nobody holds it")
            self._holders[page] -= 1
            if not self._holders[page]:
                if page in self._name_of:
                    self._idle[page] = None
                else:
                    self._blank.append(page)

    def borrow(self, tokens: Sequence[int]) -> list[int]:
        """The known pages that hold the longest beginning of a text: one holder more of each.

        The last token is never in them, for a text goes on from its logits.
        """
        pages, serial = [], 0
        for i in range((len(tokens) - max(self.ahead, 1)) // self.page_slots):
            known = self._known.get((serial, self._part(tokens, i)))
            if known is None:
                break
            self._idle.pop(known.page, None)
            self._holders[known.page] += 1
            pages.append(known.page)
            serial = known.serial
        return pages

    def tell(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Makes the pages that these tokens fill, with `ahead` to spare, known by them; the first
        to tell is borrowed from.

        `pages` are the text's, from its beginning.
        """
        serial = 0
        for i in range((len(tokens) - self.ahead) // self.page_slots):
            name = serial, self._part(tokens, i)
            if name not in self._known:
                if pages[i] in self._name_of:  # by a beginning whose own page has gone
                    return
                self._known[name] = Known(pages[i], next(self._serials))
                self._name_of[pages[i]] = name
            serial = self._known[name].serial

    def check(self) -> None:
        """AssertionError unless every page is in one place, and what is known is consistent."""
        held = [page for page, holders in enumerate(self._holders) if holders]
        everywhere = sorted([*self._blank, *self._idle, *held])
        assert everywhere == list(range(self.count)), "a page is lost or in two places"
        assert {known.page: name for name, known in self._known.items()} == self._name_of
        assert set(self._idle) <= set(self._name_of)

    def _part(self, tokens: Sequence[int], i: int) -> tuple[int, ...]:
        return tuple(tokens[i * self.page_slots : (i + 1) * self.page_slots + self.ahead])

    def _forget(self, page: int) -> None:
        del self._known[self._name_of.pop(page)]
        self._blank.append(page)
