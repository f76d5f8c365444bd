"""A progress bar in bytes, on standard error."""

import contextlib
from collections.abc import Iterator
from typing import Protocol


class Bar(Protocol):
    def advance(self, size: int) -> None: ...


@contextlib.contextmanager
def bar(doing: str, total: int, *, shown: bool) -> Iterator[Bar]:
    """Yields what is told of every part of `total` bytes that is done."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console, disable=not shown
    ) as progress:
        task = progress.add_task(doing, total=total)

        class Told:
            def advance(self, size: int) -> None:
                progress.advance(task, size)

        yield Told()
