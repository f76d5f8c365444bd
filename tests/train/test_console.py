"""What is printed: safe in any terminal, whatever text and file names hold."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.cli import clean_on_signals
from dsv3_jax.train.console import RunConsole, printable
from dsv3_jax.train.trouble import said_of


@given(st.text())
def test_printable_text_survives_any_encoding(text):
    for encoding in ("utf-8", "ascii", "latin-1"):
        shown = printable(text, encoding)
        shown.encode(encoding)
        assert len(shown) == len(text)
        assert all(c in "\n\t" or ord(c) >= 32 for c in shown)


def test_ordinary_text_is_printed_unchanged():
    assert printable('def f():\n\treturn "é → 日本"', "utf-8") == 'def f():\n\treturn "é → 日本"'


HOSTILE = "bad\n\x1b[2J" + b"\xff".decode("utf-8", "surrogateescape") + ".txt"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_file_of_any_name_can_be_told_of(encoding: str, monkeypatch: pytest.MonkeyPatch):
    written = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr("sys.stdout", written)
    RunConsole().print(said_of(3, 1.0, [4], [HOSTILE], 8, spike=False), soft_wrap=True)
    RunConsole().print(f"data       {HOSTILE}", soft_wrap=True)
    written.flush()
    event, found = written.buffer.getvalue().decode(encoding).split("\n", 1)
    assert event.startswith("update 3: main loss 1.0000, gradient not finite in row 4 of the data")
    assert "[2J" in event
    assert "\x1b" not in event + found


def test_a_command_that_only_cleans_up_at_sigterm_hears_that_its_reader_left():
    """It is no training loop, which would save at SIGTERM."""
    with pytest.raises(BrokenPipeError), clean_on_signals():
        RunConsole().on_broken_pipe()
