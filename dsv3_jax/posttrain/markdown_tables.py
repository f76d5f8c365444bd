"""Tables of reports, in Markdown."""

from collections.abc import Sequence


def cell(text: str) -> str:
    """Text that stays in its cell."""
    return " ".join(text.split()).replace("|", "\\|")


def table(head: Sequence[str], *rows: Sequence[str]) -> str:
    """Of cells, row by row."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
