"""The picture shows what was measured, the summary who wins; a sample cannot harm a terminal."""

import io
import json
import logging
import math
import random
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from dsv3_jax.drawing import BLUE, GREEN, GREY, ORANGE
from dsv3_jax.train import report
from dsv3_jax.train.report import Result, loss_picture, summary
from tests import logged

RESULT = replace(
    logged.RESULT,
    steps=2000,
    tokens=16_384_000,
    tokens_per_second=70_800.4,
    matmul_share=0.284,
    checkpoint=Path("runs/tiny-001/checkpoints/2000"),
)


def entries(count: int, mtp: float = 1.2) -> list[dict]:
    made = []
    for i in range(1, count + 1):
        loss = 3 + 5 / i
        train = {"kind": "train", "step": i, "tokens": 512 * i, "main_loss": loss}
        train |= {"mtp_loss": mtp * loss, "learning_rate": 1e-3, "max_violation": 1 / i}
        made.append(train)
        if i % 5 == 0:
            held_out = {"kind": "validation", "step": i, "tokens": 512 * i, "loss": loss}
            made.append(held_out | {"bits_per_byte": loss / 2, "rows": 4, "whole": False})
    return made


# zlib


def test_zlib_needs_a_byte_for_noise_and_next_to_nothing_for_repetition():
    noise = random.Random(0).randbytes(20_000)
    assert 8.0 < report.zlib_bits_per_byte(noise) < 8.05
    assert report.zlib_bits_per_byte(b"all work and no play\n" * 5000) < 0.1


def test_zlib_of_nothing_is_refused():
    with pytest.raises(ValueError, match="found 0 bytes"):
        report.zlib_bits_per_byte(b"")


# The picture


def pixels(path: Path, colour: str) -> int:
    """How many pixels have exactly this colour."""
    from matplotlib.image import imread

    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    image = (imread(path)[..., :3] * 255).round().astype(int)
    return int((abs(image - [[wanted]]).sum(-1) == 0).sum())


def test_the_picture_shows_losses_validation_and_zlib(tmp_path):
    loss_picture(entries(30), tmp_path / "a.png", 2.1)
    width, height = struct.unpack(">II", (tmp_path / "a.png").read_bytes()[16:24])
    assert 1400 <= width <= 2000  # sharp where a README shows it 900 wide
    assert 700 <= height <= width
    for colour in (BLUE, ORANGE, GREEN):
        assert pixels(tmp_path / "a.png", colour) > 300
    loss_picture(entries(30, mtp=0.0), tmp_path / "b.png", None)
    assert pixels(tmp_path / "b.png", ORANGE) == 0
    dashes = pixels(tmp_path / "a.png", GREY) - pixels(tmp_path / "b.png", GREY)
    assert dashes > 300


@pytest.mark.parametrize(
    "curve",
    [
        [],
        entries(1),
        entries(5)[-1:],
        [entry | {"main_loss": None, "mtp_loss": math.inf} for entry in entries(3)],
        [entry | {"loss": math.nan, "bits_per_byte": None} for entry in entries(10)],
        [{"kind": "end", "step": 3}],
    ],
    ids=["empty", "one", "only_validation", "diverged", "diverged_validation", "only_end"],
)
def test_any_curve_can_be_drawn(tmp_path, curve):
    loss_picture(curve, tmp_path / "a.png", 2.1)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_drawing_neither_follows_nor_changes_the_users_settings(tmp_path):
    import matplotlib

    loss_picture(entries(6), tmp_path / "a.png", 2.1)
    with matplotlib.rc_context({"axes.facecolor": BLUE, "font.size": 40.0}):
        loss_picture(entries(6), tmp_path / "b.png", 2.1)
        assert matplotlib.rcParams["font.size"] == 40.0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_matplotlib_says_nothing_about_fonts(tmp_path, monkeypatch, caplog):
    from matplotlib.figure import Figure

    fonts = logging.getLogger("matplotlib.font_manager")
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: fonts.warning("building the cache"))
    loss_picture(entries(1), tmp_path / "a.png", None)
    assert caplog.records == []
    fonts.warning("audible again")
    assert [record.message for record in caplog.records] == ["audible again"]


# The summary


def printed(result: Result, **options) -> str:
    stream = io.StringIO()
    summary(result, Console(file=stream, **options))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("model", "verdict"),
    [
        (1.5, "the model wins: 25.0% fewer bits than zlib"),
        (2.5, "zlib wins: the model needs 25.0% more bits"),
        (2.0, "a draw"),
        (math.nan, "the run diverged"),
    ],
)
def test_the_summary_says_plainly_who_wins(model, verdict):
    assert verdict in printed(replace(RESULT, bits_per_byte=model))


def test_the_summary_holds_every_figure_and_place():
    text = printed(RESULT)
    figures = "1.500,2.000,195,312,2.0800,16,384,000,2,000,3:51,70,800,28.4%".split(",")
    places = [str(RESULT.run_folder), str(RESULT.checkpoint), str(RESULT.picture)]
    for expected in (*figures, *places, "def add(self, name):", "    return name"):
        assert expected in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_summary_keeps_to_the_width_and_cuts_no_path(width):
    long = Path("runs") / ("x" * 120)
    lines = printed(replace(RESULT, run_folder=long), width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert "".join(lines).count("x") >= 120


def test_without_a_sample_there_is_no_sample_panel():
    assert "sample" not in printed(replace(RESULT, sample_text=""))


def test_a_sample_cannot_steer_the_terminal():
    hostile = "ok\x1b[2J\x1b]0;title\x07\r\x9b31m\x7f[bold]\n\tend"
    text = printed(replace(RESULT, sample_text=hostile))
    assert not set("\x1b\x07\r\x9b\x7f") & set(text)
    assert "[bold]" in text
    assert "end" in text


def test_an_ascii_terminal_gets_a_summary_too():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    summary(replace(RESULT, sample_text="é→\ud800"), Console(file=stream))
    stream.flush()
    assert b"the model wins" in stream.buffer.getvalue()


def test_the_written_summary_is_strict_json(tmp_path):
    report.write_summary(replace(RESULT, validation_loss=math.nan), tmp_path / "result.json")
    text = (tmp_path / "result.json").read_text()
    values = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert values["validation_loss"] is None
    assert values["tokens"] == RESULT.tokens
    assert values["run_folder"] == str(RESULT.run_folder)
    assert set(values) == set(vars(RESULT))
