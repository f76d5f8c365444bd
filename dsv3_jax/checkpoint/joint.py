"""Checkpoints that all processes of a run write and read together, each its own pieces.

As in `store.py`, only that every process writes its file into the same temporary folder, and the
first one commits when all have done so. So a folder is complete before its marker comes, whichever
process is killed when. What fails in one process fails in all. All see the same files.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dsv3_jax.checkpoint import manifest, store
from dsv3_jax.checkpoint.arrays import CheckpointError
from dsv3_jax.checkpoint.listing import told_as
from dsv3_jax.checkpoint.parts import Piece, joined, write_part
from dsv3_jax.cli import to_stderr
from dsv3_jax.parallel import processes


def save(
    folder: Path,
    step: int,
    arrays: Mapping[str, Mapping[str, Sequence[Piece]]],
    meta: dict[str, Any],
    after: Callable[[], None] = lambda: None,
) -> None:
    """Returns once the checkpoint is committed. Every process hands over the pieces that it owns,
    all with one meta; each element of an array is in one piece. `after` is done in the first
    process before the others go on.

    Raises `CheckpointError` in every process if it fails in any; nothing is then left behind.
    """

    def begin() -> str:
        temporary = store.temporary_of(folder, step)
        with _told(folder, step):
            temporary.mkdir(parents=True)
        return str(temporary)

    def write() -> str:
        with _told(folder, step):
            write_part(temporary, processes.index(), arrays)
        return ""

    def commit() -> str:
        with _told(folder, step):
            lines = joined(temporary, processes.count())
            texts = manifest.described_by(step, lines, meta, manifest.PIECES_FORMAT)
            store.commit(temporary, step, texts)
        after()
        return ""

    try:
        temporary = Path(processes.of_first("save", begin))
        try:
            processes.together("save", write)
            processes.of_first("save", commit)
        except BaseException:
            if processes.is_first():
                store.discard(temporary)
            raise
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _told(folder: Path, step: int):
    return told_as(f"cannot write checkpoint of step {step} in {folder}")


def load(
    folder: Path,
    step: int | None = None,
    groups: Collection[str] | None = None,
    *,
    wanted: store.Wanted | None = None,
    report: Callable[[str], None] = to_stderr,
) -> store.Checkpoint:
    """`store.load` in every process at once, each of the boxes that it wants: the newest checkpoint
    of which every process can read its part. Its arrays are `Parts`, or NumPy's without `wanted`.
    """
    if wanted is None:
        return store.load(folder, step, groups, report=report)
    read = partial(store.read, groups=groups, wanted=wanted)
    return store.newest_readable(folder, step, partial(_agreed, read), report)


def _agreed(
    read: Callable[[Path, int], store.Checkpoint], path: Path, step: int
) -> store.Checkpoint:
    """What `read` returns; CheckpointError if it fails in any process."""
    found: list[store.Checkpoint] = []

    def once() -> str:
        found.append(read(path, step))
        return json.dumps(step)

    try:
        processes.together("load", once)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return found[0]
