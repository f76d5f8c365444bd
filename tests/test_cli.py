"""What the commands share: one plain line for every mistake, also on a terminal, and quiet ends."""

import io
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.cli import clean_on_signals, escaped, fail, parse, user_errors

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Cake:
    """Sizes of a cake."""

    layers: int = 3
    """Layers of the cake"""
    label: str = ""
    """Written on it"""

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError(f"cake.layers is {self.layers}; allowed: at least 1")
        if " " in self.label:
            raise ValueError(f"cake.label is {self.label!r}; allowed: no spaces")


@dataclass(frozen=True)
class Order:
    """One section, as the commands have."""

    cake: Cake = field(default_factory=Cake)
    urgent: bool = False
    """Today"""


def order(*args: str) -> Order:
    return parse(Order, Order(), prog="python -m bakery", description="Bakes.", args=args)


class Terminal(io.StringIO):
    """A screen that understands colours, and some character set."""

    def __init__(self, encoding: str) -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:
        return self._encoding

    def isatty(self) -> bool:
        return True


def test_flags_change_the_defaults():
    assert order("--cake.layers", "5", "--urgent") == Order(Cake(5), urgent=True)


LONG = "x" * 150
MISTAKES = [
    (["--cake.layers", "0"], "error: cake.layers is 0; allowed: at least 1"),
    (["--cake.layers", LONG], f"--cake.layers is '{LONG}'; allowed: whole numbers"),
    (["--cake.label", f"{LONG} {LONG}"], f"error: cake.label is '{LONG} {LONG}'; allowed: no"),
    (
        ["--cake.layer", "2"],
        "Unrecognized options: --cake.layer, 2; perhaps you meant --cake.layer",
    ),
    (["--nothing-like-it"], "error: Unrecognized options: --nothing-like-it (python"),
    (["--cake.layers"], "Missing value for argument '--cake.layers'"),
]


def test_the_option_that_is_most_like_it_is_suggested_first(capsys: pytest.CaptureFixture):
    @dataclass(frozen=True)
    class Steps:
        max_bad_steps: int = 3
        seed: int = 0
        steps: int = 1

    with pytest.raises(SystemExit):
        parse(Steps, Steps(), prog="python -m x", description="", args=["--step", "3"])
    assert "perhaps you meant --steps" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("columns", ["20", "200"])
@pytest.mark.parametrize(("args", "said"), MISTAKES)
def test_a_mistake_is_told_in_one_plain_line_whatever_the_terminal(
    args: list[str],
    said: str,
    columns: str,
    encoding: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stdout", Terminal(encoding))
    with pytest.raises(SystemExit) as stop:
        order(*args)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(" (python -m bakery --help lists all options)")
    assert said in line
    assert not set("\x1b│╭─╰") & set(line)
    assert sys.stdout.getvalue() == ""
    assert os.environ["COLUMNS"] == columns


def test_help_goes_to_stdout_once_in_the_terminals_own_style(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stdout", Terminal("utf-8"))
    with pytest.raises(SystemExit) as stop:
        order("--help")
    assert stop.value.code == 0
    shown = sys.stdout.getvalue()
    assert shown.count("Bakes.") == 1
    assert "Layers" in shown
    assert "\x1b[" in shown
    assert capsys.readouterr().err == ""


@given(st.text())
def test_whatever_is_escaped_is_one_printable_line(text: str):
    assert escaped(text).isprintable()
    assert text.isprintable() <= (escaped(text) == text)


def test_fail_prints_one_line_and_exits_with_2(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        fail("two\nlines  and  \t gaps", hint="try again")
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "error: two lines and gaps (try again)\n")


@pytest.mark.parametrize("error", [ValueError("of ours"), OSError(2, "No such file", "a.txt")])
def test_user_errors_end_with_their_line(error: Exception, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop, user_errors():
        raise error
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize("error", [KeyError("ours"), BrokenPipeError(), KeyboardInterrupt()])
def test_what_no_user_did_wrong_passes(error: BaseException):
    with pytest.raises(type(error)), user_errors():
        raise error


def test_user_errors_can_be_narrowed():
    with pytest.raises(ValueError, match="a fault of ours"), user_errors((OSError,)):
        raise ValueError("a fault of ours")
    with pytest.raises(SystemExit), user_errors((OSError,)):
        raise OSError("disk full")


def start(main: str, redirect: str = "", **kwargs) -> subprocess.CompletedProcess[str]:
    """A process that runs this main, its streams redirected as a shell does it."""
    imports = "import atexit, signal, sys, time\nfrom dsv3_jax.cli import *\n"
    code = f"{imports}def main(args):\n    {main}\nrun(main)"
    shell = ["sh", "-c", f'exec "$@" {redirect}', "sh"]
    command = [*shell, sys.executable, "-W", "error", "-c", code, "some", "args"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    environment |= kwargs.pop("env", {})
    return subprocess.run(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, **kwargs
    )


@pytest.mark.parametrize(
    ("main", "code"),
    [
        ("return None", 0),
        ("return 143", 143),
        ("return len(args)", 2),
        ("raise SystemExit(7)", 7),
        ("raise KeyboardInterrupt", 130),
    ],
)
def test_the_exit_code_is_what_main_returns_and_130_for_an_interrupt(main: str, code: int):
    ended = start(main)
    assert (ended.returncode, ended.stderr) == (code, "")


@pytest.mark.parametrize(
    "main",
    [
        "print('short')",  # meets the closed pipe only when the buffer is emptied
        "print('long' * 100_000)",
        "print('short'); raise SystemExit(0)",
    ],
)
def test_a_reader_that_leaves_early_is_no_reason_for_a_word(main: str):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = start(main, stdout=writer)
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_other_errors_keep_their_traceback():
    ended = start("raise KeyError('a fault of ours')")
    assert ended.returncode == 1
    assert "KeyError: 'a fault of ours'" in ended.stderr


# --- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=("int", "term")
)
def test_a_signal_unwinds_and_nothing_runs_after_that(number: int, code: int):
    """The interpreter is not taken down: XLA may be at work in its threads."""
    main = (
        "atexit.register(print, 'taken down')\n"
        "    with clean_on_signals():\n"
        f"        try: signal.raise_signal({number:d}); print('went on')\n"
        "        finally: print('cleaned')"
    )
    ended = start(main, stdout=subprocess.PIPE)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "cleaned\n", "")


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_that_meets_a_callback_is_not_lost(name: str, code: int):
    """Python can raise nothing there, and would print what it cannot raise."""
    main = (
        f"class Last: __del__ = lambda self: signal.raise_signal(signal.{name})\n"
        "    with clean_on_signals():\n"
        "        Last(); time.sleep(20); print('went on')"
    )
    ended = start(main, stdout=subprocess.PIPE)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "", "")


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_waits_for_the_end_of_an_import(name: str, code: int, tmp_path: Path):
    """jaxlib crashes if anything is raised while it comes up."""
    text = f"import signal\nsignal.raise_signal(signal.{name})\nprint('imported')\n"
    (tmp_path / "slow_to_import.py").write_text(text)
    main = (
        f"sys.path.append({str(tmp_path)!r})\n"
        "    with clean_on_signals():\n"
        "        import slow_to_import; time.sleep(20); print('went on')"
    )
    ended = start(main, stdout=subprocess.PIPE)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "imported\n", "")


def test_other_faults_in_a_callback_are_shown():
    ended = start("class Last: __del__ = lambda self: 1 / 0\n    Last()")
    assert ended.returncode == 0
    assert "ZeroDivisionError" in ended.stderr


def test_sigterm_is_as_before_outside_of_the_block():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), clean_on_signals():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


# --- streams that are closed or full -------------------------------------------------------------


@pytest.mark.parametrize("redirect", [">&-", ">&- <&-"])
def test_a_closed_stdout_is_told_before_anything_is_done(redirect: str):
    ended = start("raise AssertionError('it went on')", redirect)
    assert ended.returncode == 2
    assert ended.stderr == (
        "error: stdout is closed; allowed: a terminal, a file, a pipe, /dev/null\n"
    )


@pytest.mark.parametrize("redirect", ["2>&-", "2>&- <&-", "<&-"])
def test_other_closed_streams_take_nothing(redirect: str, tmp_path: Path):
    """And no file gets their descriptor."""
    path = tmp_path / "file"
    said = "print('lost', file=sys.stderr, flush=True)" if "2" in redirect else "pass"
    main = f"{said}; print('text')\n    with open({str(path)!r}, 'w') as f: print(f.fileno() > 2)"
    ended = start(main, redirect, stdout=subprocess.PIPE)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "text\nTrue\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("environment", [{}, {"PYTHONUNBUFFERED": "1"}], ids=("buffered", "not"))
@pytest.mark.parametrize(
    "main",
    [
        "with user_errors(): print('short')",
        "with user_errors(): print('short', flush=True)",
        "with user_errors(): print('long' * 100_000)",
        "import tyro; parse(int, 3, prog='', description='', args=['--help'])",
    ],
)
def test_a_full_disk_under_stdout_is_one_line(main: str, environment: dict[str, str]):
    ended = start(main, ">/dev/full", env=environment)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    assert "No space left on device" in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_mistake_that_nobody_can_be_told_is_one_all_the_same():
    assert start("fail('unheard')", "2>/dev/full").returncode == 2
