"""What commands share: options from dataclasses, one line and exit 2 for bad input, quiet ends."""

import contextlib
import difflib
import io
import os
import re
import signal
import sys
import threading
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
        except SystemExit as ended:
            code = ended.code
    if code:
        fail(_one_line(written.getvalue()), hint=f"{prog} --help lists all options")
    with user_errors((OSError,)):
        return read()  # prints --help once more, in the terminal's own width and colours


def value_of(args: list[str], flag: str) -> str | None:
    """A flag's value before the real parsing, which needs it to know the defaults."""
    found = None
    for place, arg in enumerate(args):
        name, has_value, value = arg.partition("=")
        if name.replace("_", "-") != flag:  # as the real parsing has it, the last one too
            continue
        if has_value:
            found = value
        elif place + 1 < len(args):
            found = args[place + 1]
    return found


def fail(message: str, hint: str = "") -> NoReturn:
    """Prints the one line on stderr and exits 2."""
    line = escaped(" ".join(message.split()))
    try:
        print(f"error: {line}" + (f" ({hint})" if hint else ""), file=sys.stderr, flush=True)
    except OSError:  # its disk may be full, or its reader gone
        _drop_unwritten()
    raise SystemExit(USER_ERROR)


def escaped(line: str) -> str:
    """In one line, with escapes for what would steer a terminal and for what is no text."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def to_stderr(line: str) -> None:
    """Says it in one line, whatever it names."""
    print(escaped(line), file=sys.stderr, flush=True)


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
        _flush_stdout()  # or the error was that of our output
        fail(str(error))


class Stopped(KeyboardInterrupt):
    """A signal came. Like ^C, which libraries know to let through."""

    def __init__(self, number: int) -> None:
        self.number = number


def stop(number: int, frame: Any) -> None:
    """The handler inside `clean_on_signals`: raises what a signal means, but not within an import,
    since jaxlib crashes if anything is raised while it comes up. The signal then comes again a
    moment later.
    """
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return _send_again(number)
        frame = frame.f_back
    raise Stopped(number)


@contextlib.contextmanager
def clean_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP inside this block unwind it, as ^C does, so that what is half-written
    goes.
    """
    numbers = (signal.SIGTERM, signal.SIGHUP)
    # Who ignores them (nohup) goes on doing so.
    heard = [n for n in numbers if signal.getsignal(n) != signal.SIG_IGN]
    before = {n: signal.signal(n, stop) for n in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
    """Runs a command's main on the command line's arguments and exits with what it returns.

    ^C ends it with 130, SIGTERM or SIGHUP inside `clean_on_signals` with 143 or 129, a reader that
    leaves (as `head` does) with 141, all without a word. Output that cannot be written is one line
    and exit code 2.
    """
    _occupy_streams()
    sys.unraisablehook = _raise_again
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a script's & ignores it
        signal.signal(signal.SIGINT, stop)
    try:
        try:
            code = main(sys.argv[1:]) or 0
        finally:
            _flush_stdout()
    except BrokenPipeError:
        _drop_unwritten()
        code = 128 + signal.SIGPIPE
    except KeyboardInterrupt as came:
        _drop_unwritten()
        # At once: XLA may be compiling in its threads, and crashes if the interpreter is taken
        # down around it.
        os._exit(128 + _number_of(came))
    raise SystemExit(code)


def _occupy_streams() -> None:
    """Exits 2 if stdout is closed. Other closed streams take nothing and give nothing.

    Their descriptors would else be those of the next files that are opened, and what libraries
    print would go there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        fail("stdout is closed; allowed: a terminal, a file, a pipe, /dev/null")


def _flush_stdout() -> None:
    """Exits 2, with a line, if what was printed cannot be written. BrokenPipeError passes."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_unwritten()
        fail(f"stdout: {error.strerror}")


def _drop_unwritten() -> None:
    """What a stream could not write, the interpreter would try again at its end, and complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _raise_again(unraisable: Any) -> None:
    """A signal that came where Python cannot raise, as in JAX's callback from the garbage
    collector, comes again.
    """
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _send_again(_number_of(unraisable.exc_value))
    else:
        sys.__unraisablehook__(unraisable)


def _send_again(number: int) -> None:
    again = threading.Timer(0.02, signal.pthread_kill, (threading.main_thread().ident, number))
    again.daemon = True
    again.start()


def _number_of(came: KeyboardInterrupt | None) -> int:
    return getattr(came, "number", signal.SIGINT)


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
    optional = r"no type matching \{{None\}}\|{} could be instantiated from \[(.*?)\]\. .*"
    for said, allowed in (
        (r"invalid literal for int\(\) with base 10: (.*)", "whole numbers"),
        (r"could not convert string to float: (.*)", "numbers"),
        (optional.format("INT"), "whole numbers"),
        (optional.format("FLOAT"), "numbers"),
    ):
        text = re.sub(rf"^Error parsing (\S+): {said}$", rf"\1 is \2; allowed: {allowed}", text)
    if suggested and text.startswith("Unrecognized"):
        text += f"; perhaps you meant {' or '.join(suggested)}"
    elif text.startswith("Unrecognized") and text.endswith(".py"):
        text += f"; perhaps you meant --config {text.split()[-1]}"
    return text or "the command line could not be read"
