"""How a plan's tables look: columns, and numbers in their cells."""

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
        table.add_column(column, justify="left" if left else "right", no_wrap=column == "value")
    return table


def number(value: float) -> str:
    """Six digits, whole numbers whole, thousands apart."""
    if float(value).is_integer() or abs(value) >= 1e6:
        return f"{value:,.0f}"
    return f"{value:,.6g}"


def gigabytes(size: float) -> str:
    """Of bytes: two digits behind the point, or two that are not zero."""
    value = size / GB
    return f"{value:,.2f}" if abs(value) >= 0.01 or not value else f"{value:.2g}"
