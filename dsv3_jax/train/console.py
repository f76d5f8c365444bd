"""Where commands print: plain text that cannot steer a terminal, silence once nobody reads it."""

import signal
import sys
import unicodedata
from typing import Any

from rich.console import Console

from dsv3_jax.cli import stop


class RunConsole(Console):
    """Plain text, since names of files may hold [ or :, and a clean end once nobody reads it.

    ^C on `train | tee log` ends tee first: the run must save all the same.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        """`quiet` says nothing at all."""
        # Notebooks set FORCE_COLOR, which makes a terminal of a pipe, but none that redraws.
        live = None if sys.stdout.isatty() else False
        super().__init__(
            highlight=False, markup=False, emoji=False, force_interactive=live, quiet=quiet
        )

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich does it, but text may be anything that a file is named, or holds."""
        shown = (printable(x, self.encoding) if isinstance(x, str) else x for x in objects)
        super().print(*shown, **options)

    def on_broken_pipe(self) -> None:
        """Falls silent and stops a training loop, which listens for SIGTERM, or else raises."""
        self.quiet = True
        if signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, stop):
            raise BrokenPipeError
        signal.raise_signal(signal.SIGTERM)


def printable(text: str, encoding: str) -> str:
    """Text that is safe to print: no character steers the terminal, none is unknown to `encoding`.

    A model may write any byte, and a file's name hold any but two. Control characters other than
    newline and tab appear as U+FFFD.
    """
    steering = {c for c in text if unicodedata.category(c) == "Cc"} - {"\n", "\t"}
    shown = text.translate({ord(c): "\N{REPLACEMENT CHARACTER}" for c in steering})
    return shown.encode(encoding, "replace").decode(encoding)
