"""Shared by all commands: options from dataclasses; one line and exit 2 for bad input."""

import contextlib
import difflib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

USER_ERROR = 2


def parse(kind: Any, default: Any, *, prog: str, description: str, args: Sequence[str]) -> Any:
    """`kind` built by tyro from its defaults and `--section.field value` flags; exits 0 after
    --help, 2 after a mistake.
    """
    import tyro

    read = partial(
        tyro.cli, kind, default=default, prog=prog, description=description, args=list(args)
    )
    with _plain_output() as written:
        try:
            return read()
        except SystemExit as stop:
            code = stop.code
    if code:
        fail(_one_line(written.getvalue()), hint=f"{prog} --help lists all options")
    return read()  # prints --help once more, in the terminal's own width and colours


def fail(message: str, hint: str = "") -> NoReturn:
    """Prints the one line on stderr and exits 2."""
    line = printable(" ".join(message.split()))
    print(f"error: {line}" + (f" ({hint})" if hint else ""), file=sys.stderr, flush=True)
    raise SystemExit(USER_ERROR)


def printable(line: str) -> str:
    """Without what would steer a terminal, and with escapes for what is no text."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


@contextlib.contextmanager
def user_errors(kinds: tuple[type[Exception], ...] = (ValueError, OSError)) -> Iterator[None]:
    """Bad input inside this block ends the command with its one line: ValueError from our checks,
    OSError from the system.
    """
    try:
        yield
    except BrokenPipeError:  # the reader of our output left, as `head` does
        raise
    except kinds as error:
        fail(str(error))


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end this block as ^C does: what it began is cleared away. Exit codes 143
    and 129. Not around imports: native modules do not bear exceptions while they load.
    """

    def stop(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
    """Runs a command's main on the command line's arguments and exits with what it returns.

    ^C ends it with 130, a reader that leaves (as `head` does) with 141, both without a word.
    """
    try:
        try:
            code = main(sys.argv[1:]) or 0
        finally:
            sys.stdout.flush()  # or the interpreter would meet the closed pipe, and complain
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing left to flush to
        code = 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    raise SystemExit(code)


@contextlib.contextmanager
def _plain_output() -> Iterator[io.StringIO]:
    """Collects stdout and stderr. tyro sees no terminal, so it neither colours nor breaks lines,
    and UTF-8, so it draws one kind of box.
    """

    class Utf8(io.StringIO):
        encoding = "utf-8"

    width, written = os.environ.get("COLUMNS"), Utf8()
    os.environ["COLUMNS"] = "100000"
    try:
        with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
            yield written
    finally:
        del os.environ["COLUMNS"]
        if width is not None:
            os.environ["COLUMNS"] = width


def _one_line(boxed: str) -> str:
    """The first paragraph of tyro's boxed message, and the names of the options it suggests."""
    rows = [row.strip("│ ") for row in boxed.splitlines()]
    rows = [row for row in rows if row and not row.startswith(("╭", "╰"))]
    rule = next((i for i, row in enumerate(rows) if set(row) == {"─"}), len(rows))
    suggested = [row.split()[0] for row in rows[rule:] if row.startswith("--")]
    given = " ".join(rows[:rule]).partition(": ")[2]
    suggested.sort(key=lambda name: -difflib.SequenceMatcher(None, name, given).ratio())
    text = re.sub(r"^Error parsing (?!-)[\w.]*: ", "", " ".join(rows[:rule]))
    for said, allowed in (
        (r"invalid literal for int\(\) with base 10", "whole numbers"),
        (r"could not convert string to float", "numbers"),
    ):
        text = re.sub(
            rf"^Error parsing (\S+): {said}: (.*)$", rf"\1 is \2; allowed: {allowed}", text
        )
    if suggested and text.startswith("Unrecognized"):
        text += f"; perhaps you meant {' or '.join(suggested)}"
    elif text.startswith("Unrecognized") and text.endswith(".py"):
        text += f"; perhaps you meant --config {text.split()[-1]}"
    return text or "the command line could not be read"
