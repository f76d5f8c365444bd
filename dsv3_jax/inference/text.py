"""Tokens to text as they come: whole characters only, and nothing of a stop string."""

import codecs
from collections.abc import Sequence

REPLACEMENT = "\ufffd".encode()


class TextStream:
    """Takes one token after the other and says what of the text is certain.

    Held back are the bytes of an unfinished character, and an end of the text that may turn out to
    be the beginning of a stop string.
    """

    def __init__(self, token_bytes: Sequence[bytes], stops: Sequence[str] = ()) -> None:
        """`token_bytes` of every id; ids beyond are U+FFFD. ValueError for an empty stop string."""
        if "" in stops:
            raise ValueError("a stop string is empty; allowed: one character or more")
        self._token_bytes, self._stops = token_bytes, stops
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False
        """A stop string came; the text ends before it"""

    def add(self, token: int) -> str:
        """More of the text, now certain. Not to be called once it has stopped."""
        known = token < len(self._token_bytes)
        return self._shown(self._decoder.decode(self._token_bytes[token] if known else REPLACEMENT))

    def finish(self) -> str:
        """What was held back, if the text ends here."""
        shown = "" if self.stopped else self._shown(self._decoder.decode(b"", final=True))
        return shown if self.stopped else shown + self._held

    def _shown(self, more: str) -> str:
        text = self._held + more
        found = [place for place in map(text.find, self._stops) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        hold = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    most = min(len(stop) - 1, len(text))
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
