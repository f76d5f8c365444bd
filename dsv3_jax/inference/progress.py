"""How far an engine has come, on standard error."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(total: int, told: Callable[[], str], *, shown: bool) -> Iterator[Callable[..., None]]:
    """Yields what hears how many of `total` have ended, or of how many instead; `told` is what
    stands beside that.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
    console = Console(stderr=True)
    # Else rich would send to stderr what goes to stdout.
    with Progress(
        *columns, TimeElapsedColumn(), console=console, redirect_stdout=False, disable=not shown
    ) as bar:
        task = bar.add_task("compiling", total=total)
        yield lambda ended, total=total: bar.update(
            task, completed=ended, total=total, description=told()
        )
