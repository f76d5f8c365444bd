"""Which checkpoints a folder holds, beside a writer that adds and removes some (see `store.py`).

A list can be old as soon as it is made: whoever reads what it names must be ready for
`ReplacedError` and make it again.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from dsv3_jax.checkpoint.arrays import CheckpointError, OrbaxError

MARKER = "COMMITTED"
STEP = re.compile(r"step_([0-9]{8}|[1-9][0-9]{8,})(\.old)?")
# A writer that keeps one checkpoint takes longer to write the next than to be listed twice.
_LISTS, _READS = 5, 5

Read = TypeVar("Read")


class ReplacedError(CheckpointError):
    """The writer removed or replaced a checkpoint while it was read, which is no damage."""


def committed(folder: Path) -> dict[int, Path]:
    """Returns step -> its committed folder; `step_x` comes before `step_x.old`.

    A step that moves while it is looked for could be missed at either place, so two lists in a row
    must agree.
    """
    found = _committed_now(folder)
    for _ in range(_LISTS):
        before, found = found, _committed_now(folder)
        if found == before:
            break
    return found


def _committed_now(folder: Path) -> dict[int, Path]:
    found: dict[int, Path] = {}
    with told_as(f"cannot read {folder}"):  # a step that cannot be looked at is not ignored
        for path in entries(folder):
            match = STEP.fullmatch(path.name)
            if match and is_committed(path):
                found.setdefault(int(match[1]), path)
    return found


def is_committed(path: Path) -> bool:
    return (path / MARKER).is_file()


def require(folder: Path, steps: Mapping[int, Path], step: int) -> Path:
    """Returns a step's folder; raises `CheckpointError` if there is none."""
    if step not in steps:
        raise CheckpointError(
            f"no checkpoint of step {step} in {folder}: found steps {sorted(steps)}"
        )
    return steps[step]


def entries(folder: Path) -> list[Path]:
    """Returns the sorted entries of a folder, none where there is no folder."""
    with told_as(f"cannot read {folder}"):
        try:
            return sorted(folder.iterdir())
        except FileNotFoundError:
            return []


def contents(folder: Path) -> str:
    """Returns what an error message says about a folder without checkpoints."""
    if not folder.exists():
        return "no such folder"
    names = [path.name for path in entries(folder)]
    if len(names) > 3:
        return f"{len(names)} entries ({', '.join(names[:3])}, ...)"
    return ", ".join(names) or "an empty folder"


# --- reading beside a writer ---------------------------------------------------------------------


def again_if_replaced(folder: Path, read: Callable[[], Read]) -> Read:
    """Returns what `read` does; it lists and reads again where a checkpoint went meanwhile."""
    for _ in range(_READS):
        with contextlib.suppress(ReplacedError):
            return read()
    raise CheckpointError(
        f"{folder}: the checkpoint that was read was replaced meanwhile, {_READS} times in a row; "
        "allowed: a run that keeps more of them (output.keep_last), or one that has ended"
    )


@contextlib.contextmanager
def unless_replaced(path: Path) -> Iterator[None]:
    """Turns an error into `ReplacedError` if the checkpoint is no longer the one it was."""
    before = _identity(path)
    try:
        yield
    except CheckpointError as error:
        if before is None or _identity(path) != before:
            raise ReplacedError(str(error)) from error
        raise


def _identity(path: Path) -> tuple[int, int] | None:
    """Of what is committed there; None if nothing is any more."""
    try:
        status = (path / MARKER).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


# --- errors --------------------------------------------------------------------------------------


@contextlib.contextmanager
def told_as(doing: str) -> Iterator[None]:
    """Turns an error of the file system or of Orbax into one line that starts with `doing`."""
    try:
        yield
    except (OSError, OrbaxError) as error:
        raise CheckpointError(f"{doing}: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    """Returns an error's message in one line, at most 400 characters long."""
    if system := re.search(r"(?:os_error_code='|OS error )(\d+)", str(error)):
        return os.strerror(int(system[1]))  # in which temporary file is of no use to anybody
    line = " ".join(str(error).split()).split(" [tensorstore_spec=")[0]
    # TensorStore goes from the outer to the inner error: the cause stands at the end.
    return line if len(line) <= 400 else f"{line[:100]} ... {line[-295:]}"
