"""How a plan's tables look: columns, and numbers in their cells."""

import contextlib
import json
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

GB = 10**9
WORDS = {"", "unit", "from", "source", "cut", "schedule"}


def new_table(title: str | None, *columns: str, words: Collection[str] = WORDS) -> "Table":
    """Columns of `words` stand to the left, of numbers to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for column in columns:
        left = column in words
        table.add_column(column, justify="left" if left else "right")
    return table


def print_json(told: Any) -> None:
    """OSError that names stdout, where that cannot be written."""
    with _naming_stdout():
        print(json.dumps(told, indent=2), flush=True)


@contextlib.contextmanager
def _naming_stdout() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # its reader left
        raise
    except OSError as error:
        raise OSError(f"stdout: {error.strerror}") from error


def print_parts(console: "Console", parts: Sequence["Table | str"]) -> None:
    """Texts, and tables whose figures are whole at any width: headings and words give way, and the
    terminal breaks what is wider still. Where nobody said how wide a file is, it is as wide as the
    widest table. OSError that names stdout, where that cannot be written.
    """
    tables = [part for part in parts if not isinstance(part, str)]
    for table in tables:
        _keep_figures(table)
    endless = console.options.update(max_width=10_000)
    widths = [console.measure(table, options=endless).maximum for table in tables]
    if not (sys.stdout.isatty() or "COLUMNS" in os.environ):
        console.width = max([console.width, *widths])
    for table, width in zip(tables, widths, strict=True):
        if width > console.width:
            table.collapse_padding = True
    with _naming_stdout():
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, str), crop=False)


def _keep_figures(table: "Table") -> None:
    from rich.cells import cell_len

    for column in table.columns:
        column.overflow = "fold"
        if column.justify == "right":
            column.min_width = max(map(cell_len, map(str, column.cells)), default=0)
            # What is as narrow as its figures cannot give way.
            head = max(map(cell_len, str(column.header).splitlines()), default=0)
            column.no_wrap = head <= column.min_width


def number(value: float) -> str:
    """Six digits, whole numbers whole, thousands apart."""
    if float(value).is_integer() or abs(value) >= 1e6:
        return f"{value:,.0f}"
    return f"{value:,.6g}"


def gigabytes(size: float) -> str:
    """Of bytes: two digits behind the point, or two that are not zero."""
    value = size / GB
    return f"{value:,.2f}" if abs(value) >= 0.01 or not value else f"{value:.2g}"
