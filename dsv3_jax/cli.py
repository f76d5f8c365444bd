"""What all commands share: options from dataclasses, one line and exit code 2 for every mistake
of the user's.
"""

import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

USER_ERROR = 2


def parse(kind: Any, default: Any, *, prog: str, description: str, args: Sequence[str]) -> Any:
    """`kind` built by tyro from its defaults and `--section.field value` flags; exits 0 after
    --help, 2 after a mistake.
    """
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                kind, default=default, prog=prog, description=description, args=list(args)
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        fail(_one_line(complaint.getvalue()), hint=f"{prog} --help lists all options")


def fail(message: str, hint: str = "") -> NoReturn:
    """Prints the one line on stderr and exits 2."""
    line = " ".join(message.split())
    print(f"error: {line}" + (f" ({hint})" if hint else ""), file=sys.stderr, flush=True)
    raise SystemExit(USER_ERROR)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Bad input inside this block ends the command with its one line: ValueError from our checks,
    OSError from the system.
    """
    try:
        yield
    except BrokenPipeError:  # the reader of our output left, as `head` does
        raise
    except (ValueError, OSError) as error:
        fail(str(error))


def run(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
    """Runs a command's main on the command line's arguments and exits with what it returns."""
    try:
        raise SystemExit(main(sys.argv[1:]) or 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing left to flush to
        raise SystemExit(128 + signal.SIGPIPE) from None


def _one_line(boxed: str) -> str:
    """The first paragraph of tyro's boxed message, and the names of the options it suggests."""
    rows = [re.sub(r"^[│|]\s*|\s*[│|]$", "", row.strip()) for row in boxed.splitlines()]
    rows = [row for row in rows if row and not row.startswith(("╭", "╰"))]
    rule = next((i for i, row in enumerate(rows) if set(row) <= {"─", "-"}), len(rows))
    suggested = [row.split()[0] for row in rows[rule:] if row.startswith("--")]
    text = " ".join(rows[:rule])
    if suggested and text.startswith("Unrecognized"):
        text += f"; perhaps you meant {' or '.join(suggested)}"
    return text or "the command line could not be read"
