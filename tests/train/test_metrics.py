"""metrics.jsonl survives kills and resumes; every record is shown, on a terminal or not."""

import io
import json
import math
import os
import re
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from dsv3_jax.train import metrics
from dsv3_jax.train.metrics import MetricsLog, Progress, clock, read_metrics, strict_json

ESCAPE = "\x1b"


def train(step: int, **changes: Any) -> dict[str, Any]:
    values = {"kind": "train", "step": step, "tokens": 512 * step, "main_loss": 7.5 - step / 1000}
    values |= {"mtp_loss": 8.25, "grad_norm": 0.8, "learning_rate": 2.2e-4, "max_violation": 0.4}
    return values | {"tokens_per_second": 12345.6, "matmul_share": 0.312} | changes


def validation(step: int, whole: bool = False) -> dict[str, Any]:
    values = {"kind": "validation", "step": step, "tokens": 512 * step, "loss": 3.125}
    return values | {"bits_per_byte": 2.345, "bytes": 1000, "rows": 64, "whole": whole}


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def written(path, entries, resume_tokens=None):
    with closing(MetricsLog(path, resume_tokens)) as log:
        for entry in entries:
            log.append(entry)
    return path


# metrics.jsonl


def test_strict_readers_accept_every_value():
    odd = {"a": math.nan, "b": [-math.inf, (1.0, np.float32(math.inf))], "c": np.arange(3)}
    text = strict_json(odd | {"d": np.float32(0.5), "e": {"f": np.int64(7)}})
    assert json.loads(text, parse_constant=no_constant) == {
        "a": None,
        "b": [None, [1.0, None]],
        "c": [0, 1, 2],
        "d": 0.5,
        "e": {"f": 7},
    }


def test_entries_are_read_back_exactly(tmp_path):
    entries = [train(1, main_loss=0.1 + 0.2), validation(1), train(2, why="é\n\u2028")]
    path = written(tmp_path / "metrics.jsonl", entries)
    assert read_metrics(path) == entries
    assert len(path.read_bytes().splitlines()) == len(entries)


def test_an_entry_is_in_the_file_as_soon_as_append_returns(tmp_path):
    with closing(MetricsLog(tmp_path / "metrics.jsonl")) as log:
        log.append(train(1))
        assert read_metrics(tmp_path / "metrics.jsonl") == [train(1)]


def test_a_new_run_never_overwrites_the_curve_of_another(tmp_path):
    path = written(tmp_path / "metrics.jsonl", [train(1)])
    with pytest.raises(FileExistsError):
        MetricsLog(path)
    assert read_metrics(path) == [train(1)]


def test_wherever_a_kill_tears_the_file_the_whole_lines_before_it_count(tmp_path):
    entries = [train(1), train(2) | {"text": "é"}]
    path = tmp_path / "metrics.jsonl"
    whole = written(path, entries).read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        kept = read_metrics(path)
        assert kept == entries[: len(kept)]
        assert len(kept) >= whole[:size].count(b"\n")


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{json.dumps(train(1))}\nnot json\n{json.dumps(train(2))}\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: found b'not json'") as error:
        read_metrics(path)
    assert "\n" not in str(error.value)
    path.write_text(f"{json.dumps(train(1))}\n{{}}\n{json.dumps(train(2))}\n")
    with pytest.raises(ValueError, match=r"line 2: found b'{}'; allowed: a metrics entry"):
        read_metrics(path)


@pytest.mark.parametrize(
    "wrong", [{"step": "1"}, {"tokens": None}, {"tokens": True}, {"kind": 1}, {"main_loss": "x"}]
)
def test_an_entry_of_wrong_types_is_named(tmp_path, wrong):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{json.dumps(train(1))}\n{json.dumps(train(2) | wrong)}\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: .*; allowed: a metrics entry$"):
        read_metrics(path)


@pytest.mark.parametrize("torn", [b"", b'{"kind": "tr', b'{"kind": "\xc3', b"\0\0\0"])
def test_a_resumed_run_has_one_clean_curve(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    written(path, [train(1), train(2), validation(2), train(3), validation(3)])
    path.write_bytes(path.read_bytes() + torn)
    written(path, [train(3), train(4)], resume_tokens=2 * 512)
    assert read_metrics(path) == [train(1), train(2), validation(2), train(3), train(4)]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path):
    path = written(tmp_path / "metrics.jsonl", [train(1)])
    written(path, [train(1, main_loss=1.0)], resume_tokens=0)
    assert read_metrics(path) == [train(1, main_loss=1.0)]


def test_a_kill_during_the_clean_up_loses_nothing(tmp_path, monkeypatch):
    path = written(tmp_path / "metrics.jsonl", [train(1), train(2)])

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsLog(path, resume_tokens=512)
    assert read_metrics(path) == [train(1), train(2)]


# Plain lines


class Recorder(io.StringIO):
    """A stream that is no terminal and remembers what a reader at its other end has got."""

    def __init__(self) -> None:
        super().__init__()
        self.flushed = ""

    def flush(self) -> None:
        self.flushed = self.getvalue()


def plain_lines(records: list[dict[str, Any]], total: int = 1000) -> list[str]:
    stream = Recorder()
    with Progress(total, title="tiny", console=Console(file=stream)) as progress:
        for record in records:
            progress.update(record)
            assert stream.flushed == stream.getvalue(), "a line waits in the buffer"
    return stream.getvalue().splitlines()


def test_without_a_terminal_each_record_is_one_line_under_its_header():
    title, header, *lines = plain_lines([train(10 * i) for i in range(1, 5)])
    assert title == "tiny: 1000 steps to go"
    assert len(lines) == 4
    assert lines[0].split()[:8] == "10/1000 7.490 8.250 0.8000 2.20e-04 12,346 31.2% 0.400".split()
    ends = [match.end() for match in re.finditer(r"\S+(?: \S+)*", header)]
    for line in lines:
        assert [match.end() for match in re.finditer(r"\S+", line)] == ends


def test_plain_lines_stay_narrow_aligned_and_without_escapes_for_any_value():
    odd = [
        train(1, main_loss=math.nan, grad_norm=math.inf, mtp_loss=None),
        train(2, main_loss=1e30, grad_norm=1.5e-30, tokens_per_second=1e8, max_violation=255.0),
        validation(2),
    ]
    lines = plain_lines(odd, total=1_000_000)
    assert max(map(len, lines)) <= 120
    assert len(lines[2]) == len(lines[3]) == len(lines[1])
    assert ESCAPE not in "".join(lines)
    assert all(line.isascii() for line in lines)


def test_validation_stands_between_the_lines_of_training():
    *_, partial, whole = plain_lines([train(10), validation(10), validation(20, whole=True)])
    assert "after step 10: 2.345 bits per byte, 3.1250 nats per token (64 rows)" in partial
    assert "after step 20" in whole
    assert "whole split" in whole


def test_a_header_is_always_on_the_screen():
    lines = plain_lines([train(i) for i in range(1, 51)])
    headers = [number for number, line in enumerate(lines) if "main loss" in line]
    assert headers == [1, 22, 43]


def test_a_message_is_shown_as_it_is():
    stream = Recorder()
    path = "/runs/" + "x" * 150 + "/[bold]"
    Progress(10, console=Console(file=stream, width=80)).message(path)
    assert stream.getvalue() == path + "\n"


def test_a_dumb_terminal_gets_plain_lines():
    stream = Recorder()
    console = Console(file=stream, force_terminal=True, _environ={"TERM": "dumb"})
    with Progress(10, console=console) as progress:
        progress.update(train(1))
    assert ESCAPE not in stream.getvalue()
    assert "7.499" in stream.getvalue()


# The live display


def terminal(width: int = 100, **environ: str) -> Console:
    environ = {"TERM": "xterm-256color"} | environ
    return Console(file=Recorder(), force_terminal=True, width=width, height=30, _environ=environ)


def shown(progress: Progress, width: int = 100) -> list[str]:
    """What the live display looks like, without colours."""
    paper = Console(file=io.StringIO(), width=width, _environ={})
    paper.print(progress._view())
    return paper.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [100, 80, 50, 30])
def test_the_display_shows_every_number_within_its_width(width):
    progress = Progress(1000, title="tiny", console=terminal(width))
    progress.update(train(100, mtp_loss=math.nan))
    progress.update(validation(100))
    lines = shown(progress, width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for value in "7.400 nan 2.345 0.8000 2.20e-04 0.400 12,346 31.2%".split():
        assert value in text
    if width > 30:
        assert "100/1000 (10%)" in text


def test_the_display_stands_before_the_first_record():
    assert "0/1000 (0%)" in shown(Progress(1000, console=terminal()))[0]


def test_a_resumed_run_starts_where_it_was():
    assert "250/1000 (25%)" in shown(Progress(1000, 250, console=terminal()))[0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, None])
def test_the_terminal_is_given_back_whatever_happens(error):
    console = terminal()

    def body():
        with Progress(10, console=console) as progress:
            progress.update(train(1))
            assert console.file.getvalue().startswith(f"{ESCAPE}[?25l")  # the cursor is hidden
            if error:
                raise error

    if error:
        with pytest.raises(error):
            body()
    else:
        body()
    assert console.file.getvalue().rstrip().endswith(f"{ESCAPE}[?25h")


@pytest.mark.parametrize(("environ", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_no_color_is_respected(environ, coloured):
    console = terminal(**environ)
    with Progress(10, console=console) as progress:
        progress.update(train(5))
        progress.update(train(6))
    colours = re.findall(r"\x1b\[(?:\d;)*[39]\d", console.file.getvalue())
    assert bool(colours) == coloured


def test_a_message_appears_above_the_display():
    console = terminal()
    with Progress(10, title="tiny", console=console) as progress:
        progress.message("saved")
    text = console.file.getvalue()
    assert text.index("saved") < text.rindex("tiny")


# Remaining time and the curve


def test_the_remaining_time_follows_the_recent_pace_and_ticks_on():
    now = [0.0]
    console = Console(file=io.StringIO(), get_time=lambda: now[0])
    progress = Progress(10_000, console=console)
    now[0] = 60.0  # compiling
    progress.update(train(10))
    assert progress._remaining() == "-"
    now[0] = 80.0
    progress.update(train(20))
    assert progress._remaining() == clock(9980 * 2.0)
    now[0] = 90.0
    assert progress._remaining() == clock(9980 * 2.0 - 10)
    for step in range(30, 30 + 10 * metrics.PACE_WINDOW, 10):
        now[0] += 5.0
        progress.update(train(step))
    assert progress._remaining() == clock((10_000 - step) * 0.5)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (187, "3:07"), (43387, "12:03:07")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize("count", [1, 2, 47, 48, 49, 1000, 5000])
def test_the_curve_covers_the_whole_run_in_constant_space(count):
    curve = metrics._Curve()
    for i in range(count):
        curve.add(10.0 - 9.0 * i / count)
    bars = [metrics.CURVE_BARS.index(bar) for bar in curve.bars]
    assert 1 <= len(bars) < metrics.CURVE_POINTS
    assert bars == sorted(bars, reverse=True)
    if count > 1:  # a straight fall is drawn straight: all bars stand for equally many updates
        top, last = len(metrics.CURVE_BARS) - 1, len(bars) - 1
        assert all(abs(bar - top * (1 - i / last)) <= 0.51 for i, bar in enumerate(bars))


def test_the_curve_passes_over_what_is_not_finite():
    curve = metrics._Curve()
    for value in (2.0, math.nan, 1.0, math.inf):
        curve.add(value)
    assert curve.bars == "█▁"
