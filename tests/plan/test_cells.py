"""What a plan prints at any width, and into files."""

from pathlib import Path

import pytest

from dsv3_jax.config.load import load_config
from dsv3_jax.plan.__main__ import main
from dsv3_jax.plan.cells import gigabytes, number
from dsv3_jax.plan.memory import memory_of

V3 = Path(__file__).parents[2] / "configs" / "dsv3_671b.py"


def told(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    main(["--config", str(V3), *args])
    return capsys.readouterr().out


def figures() -> list[list[str]]:
    """Of every row of the memory table."""
    found = []
    for rank in memory_of(load_config(V3)).ranks:
        sizes = [*rank.persistent.values(), rank.total, rank.workspace]
        found.append([gigabytes(size) for size in sizes])
    return found


def test_a_file_is_as_wide_as_its_widest_table(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    narrow = told(capsys)
    monkeypatch.setenv("COLUMNS", "400")
    wide = told(capsys)
    assert [row.rstrip() for row in narrow.splitlines()] == [
        row.rstrip() for row in wide.splitlines()
    ]


@pytest.mark.parametrize("columns", ["40", "80", "100"])
def test_no_figure_is_shortened_at_any_width(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", columns)
    text = told(capsys)
    assert "…" not in text
    rows = [row.split() for row in text.splitlines()]
    for cells in figures():
        assert any(all(cell in row for cell in cells) for row in rows)


@pytest.mark.parametrize("columns", ["30", "80"])
def test_a_schedules_figures_are_whole_too(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", columns)
    main("--schedule dualpipe --F 1234.5 --B 2469 --FB 3000.25".split())
    text = capsys.readouterr().out
    assert "…" not in text
    assert "5297.25" in text


def test_headings_give_way_on_a_terminal_of_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert all(len(row.rstrip()) <= 80 for row in told(capsys).splitlines() if row.startswith(" "))


def test_numbers_have_six_digits_and_whole_ones_all():
    assert [number(x) for x in (0.5, 1234567.8, 3.0, 12.3456789)] == [
        "0.5",
        "1,234,568",
        "3",
        "12.3457",
    ]
