"""Training checkpoints on disk: flat groups of named arrays, and JSON beside them.

The report trains on 2048 GPUs (section 3.1) and does not describe its checkpoints. Ours are
whole or absent, never in between. One checkpoint is one folder:

    <folder>/step_00000123/
        arrays/          by Orbax, see `arrays.py`; or, of a run in several processes,
        part-00000.safetensors ...    each process's pieces, see `parts.py`
        meta.json        what the caller wants back besides arrays
        manifest.json    format, step, CRC-32 of meta.json; shape, dtype, CRC-32 of each array
        COMMITTED        CRC-32 of manifest.json; written last

**A half-written checkpoint is never picked up.** Only a folder with a `COMMITTED` file exists for
`steps` and `load`. `save` goes in this order, each line durable (fsync) before the next:
  1. everything but the marker is written under `step_00000123.tmp-<random>`;
  2. that folder is renamed to `step_00000123`;
  3. the marker appears by an atomic `os.replace`.
The rename alone would do where a rename is atomic, and the marker alone where it is not (network
and object-store mounts copy a folder file by file). With the marker after the rename, a marker
beside incomplete data takes a file system that breaks its word on fsync. Tested are kills and
errors at every one of these places, and the order of the fsync calls; not a real loss of power.

**Saving a step again** replaces it. The committed one is first renamed to `step_00000123.old`,
marker included, where it still counts as step 123 until the new marker exists. So at every
moment one of the two is valid. `delete` goes the other way round: marker first, then the data.

Checksums are verified on every load: Orbax does not notice a flipped bit in an array.

A reader that meets a step which the writer replaced or let go of lists and reads again.

One writer per folder: `save`, or of several processes `joint.save` (`saver.py` works in the
background and thins out). Readers may come at any time.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from dsv3_jax.checkpoint import manifest
from dsv3_jax.checkpoint.arrays import (
    CheckpointError,
    crc32,
    describe,
    read_arrays,
    to_host,
    write_arrays,
)
from dsv3_jax.checkpoint.boxes import Box, whole
from dsv3_jax.checkpoint.listing import (
    MARKER,
    STEP,
    ReplacedError,
    again_if_replaced,
    committed,
    contents,
    entries,
    is_committed,
    require,
    told_as,
    unless_replaced,
)
from dsv3_jax.checkpoint.manifest import Lines
from dsv3_jax.checkpoint.parts import Parts, Reader, is_in_pieces
from dsv3_jax.cli import to_stderr
from dsv3_jax.files import sync, sync_tree

if TYPE_CHECKING:
    import jax

Wanted = Mapping[str, Mapping[str, Sequence[Box]]]
"""Group -> name -> boxes"""
_TEMPORARY = re.compile(r"step_[0-9]{8,}\.tmp-[0-9a-f]{8}")


Read = TypeVar("Read")


@dataclass(frozen=True)
class Checkpoint:
    """What `load` returns."""

    step: int
    arrays: dict[str, dict[str, np.ndarray]]  # group -> name -> array
    meta: dict[str, Any]
    bytes_read: int = 0
    """By this process, where it was asked to read parts alone"""


def save(
    folder: Path,
    step: int,
    arrays: Mapping[str, Mapping[str, "jax.Array | np.ndarray | np.generic"]],
    meta: dict[str, Any],
) -> Path:
    """Returns the committed folder `<folder>/step_<step>`, replacing that step if it exists.

    `arrays` maps group (such as "params", "mu") to name to array, of any shape and of a dtype in
    `arrays.DTYPES`, stored bit for bit. `meta` is stored as strict JSON: its tuples come back as
    lists, its keys as strings, and NaN is refused.

    Raises `CheckpointError` (disk full, folder not writable, unsupported dtype, ...); temporary
    files are then gone, and every earlier checkpoint is what it was.
    """
    host = {
        group: {name: to_host(f"{group}/{name}", x) for name, x in named.items()}
        for group, named in arrays.items()
    }
    lines = {
        group: {name: describe(array) for name, array in named.items()}
        for group, named in host.items()
    }
    texts = manifest.described_by(step, lines, meta)
    temporary = temporary_of(folder, step)
    with told_as(f"cannot write checkpoint of step {step} in {folder}"):
        try:
            os.makedirs(temporary)
            write_arrays(temporary / "arrays", host)
            return commit(temporary, step, texts)
        except BaseException:  # an interrupt, too, leaves nothing behind
            discard(temporary)
            raise


def temporary_of(folder: Path, step: int) -> Path:
    """Where a checkpoint is to be written until `commit`."""
    if step < 0:
        raise CheckpointError(f"step of a checkpoint: {step}; allowed: 0 or more")
    return folder / f"{_step_folder(folder, step).name}.tmp-{secrets.token_hex(4)}"


def commit(temporary: Path, step: int, texts: tuple[bytes, bytes]) -> Path:
    """Turns a folder whose arrays are written into the committed one, which it returns. `texts`:
    meta and manifest, of `manifest.described_by`.
    """
    folder, final = temporary.parent, _step_folder(temporary.parent, step)
    meta_bytes, manifest_bytes = texts
    _write_file(temporary / "meta.json", meta_bytes)
    _write_file(temporary / "manifest.json", manifest_bytes)
    sync_tree(temporary)
    sync(folder.parent)  # the folder of checkpoints may be new
    _publish(temporary, final, marker=crc32(manifest_bytes).encode())
    return final


def load(
    folder: Path,
    step: int | None = None,
    groups: Collection[str] | None = None,
    *,
    report: Callable[[str], None] = to_stderr,
) -> Checkpoint:
    """Returns the checkpoint of `step`, or the newest valid one, with NumPy arrays.

    Names, shapes, dtypes and checksums are verified. `groups` restricts reading to some groups.
    Without a `step`, one that cannot be used is told to `report` in one line and the one before
    it is tried; with a `step`, it raises.

    Raises `CheckpointError` where nothing usable is found.
    """
    return newest_readable(folder, step, partial(read, groups=groups), report)


def described(
    folder: Path, step: int | None = None, *, report: Callable[[str], None] = to_stderr
) -> tuple[int, dict[str, dict[str, dict[str, Any]]]]:
    """Returns the step that `load` would read, as far as that can be said without reading arrays,
    and group -> name -> shape, dtype and CRC-32.
    """
    return newest_readable(folder, step, _read_description, report)


def steps(folder: Path) -> list[int]:
    """Returns the committed steps in ascending order; their contents are not verified."""
    return sorted(committed(folder))


def delete(folder: Path, step: int) -> None:
    """Deletes a committed step, marker first: a kill midway leaves nothing that looks valid."""
    require(folder, committed(folder), step)
    final = _step_folder(folder, step)
    with told_as(f"cannot delete checkpoint {final}"):
        _drop(_replaced(final))  # before its successor, or it would count again
        _drop(final)


def clean(folder: Path) -> list[Path]:
    """Removes and returns what was never committed, or was replaced. Not while another saves."""
    kept = set(committed(folder).values())
    stale = [
        path
        for path in entries(folder)
        if path not in kept and (STEP.fullmatch(path.name) or _TEMPORARY.fullmatch(path.name))
    ]
    with told_as(f"cannot clean {folder}"):
        for path in stale:
            _drop(path)
    return stale


# --- which folders count -------------------------------------------------------------------------


def _step_folder(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def _replaced(final: Path) -> Path:
    """Where a committed step waits while it is being replaced."""
    return final.with_name(f"{final.name}.old")


# --- writing -------------------------------------------------------------------------------------


def _publish(temporary: Path, final: Path, marker: bytes) -> None:
    """Turns a complete temporary folder into the committed `final` (steps 2 and 3 above)."""
    old = _replaced(final)
    if is_committed(final):
        _drop(old)  # left by an earlier replacement that was killed after its commit
        os.rename(final, old)
    elif final.exists():
        _drop(final)
    try:
        os.rename(temporary, final)
        sync(final.parent)
        _write_file(final / f"{MARKER}.tmp", marker)
        os.replace(final / f"{MARKER}.tmp", final / MARKER)
        sync(final)
    except BaseException:
        discard(final)  # whatever stands there is the new one: the committed one stands aside
        if is_committed(old):
            os.rename(old, final)
        raise
    discard(old)


def _drop(path: Path) -> None:
    """Removes a folder, if there is one, so that it stops counting before it is incomplete."""
    if path.exists():
        if is_committed(path):
            os.unlink(path / MARKER)
            sync(path)
        shutil.rmtree(path)


def discard(path: Path) -> None:
    """Like `_drop`, but an error is no reason to fail: `clean` removes what is left."""
    # After an error Orbax's threads may still create a file or two: 20 tries, 1 s at most.
    for _ in range(20):
        with contextlib.suppress(OSError):
            _drop(path)
        if not path.exists():
            return
        time.sleep(0.05)


def _write_file(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


# --- reading -------------------------------------------------------------------------------------


def newest_readable(
    folder: Path,
    step: int | None,
    read: Callable[[Path, int], Read],
    report: Callable[[str], None],
) -> Read:
    """Returns what `read` makes of a step, or of the newest one that it can read."""
    reasons: list[str] = []

    def once() -> Read:
        found = committed(folder)
        if step is not None:
            return read(require(folder, found, step), step)
        if not found:
            raise CheckpointError(
                f"no checkpoint in {folder}: found {contents(folder)}; "
                f"needed: a folder step_<8 digits> with a file {MARKER}"
            )
        for number in sorted(found, reverse=True):
            try:
                return read(found[number], number)
            except ReplacedError:
                raise
            except CheckpointError as error:
                if str(error) not in reasons:
                    reasons.append(str(error))
                    report(f"checkpoint skipped: {error}")
        raise CheckpointError(
            f"no usable checkpoint in {folder}: all {len(found)} fail, newest: {reasons[0]}"
        )

    return again_if_replaced(folder, once)


def read(
    path: Path,
    step: int,
    groups: Collection[str] | None,
    wanted: Wanted | None = None,
) -> Checkpoint:
    """Returns a committed folder's content, verified; raises `CheckpointError` where it fails.

    With `wanted`, arrays are `Parts`: of its groups those arrays and boxes alone, of others all.
    """
    with unless_replaced(path), told_as(f"checkpoint {path}"):
        known = manifest.verified(path, step)
        meta_bytes = manifest.content(path, "meta.json")
        manifest.expect(path, "CRC-32 of meta.json", crc32(meta_bytes), known["meta"])
        described = known["arrays"]
        missing = sorted(set(groups or ()) - set(described))
        if missing:
            raise CheckpointError(
                f"checkpoint {path}: no group {', '.join(missing)}; found: "
                f"{', '.join(sorted(described))}"
            )
        lines = described if groups is None else {group: described[group] for group in groups}
        arrays, size = _arrays(path, only(lines, wanted or {}), wanted)
    return Checkpoint(step, arrays, json.loads(meta_bytes), size)


def only(
    groups: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Collection[str]]
) -> dict[str, dict[str, Any]]:
    """Without the arrays that nobody wants of groups of which only some are wanted."""
    return {
        group: {name: x for name, x in named.items() if name in wanted.get(group, named)}
        for group, named in groups.items()
    }


def _arrays(
    path: Path, lines: Lines, wanted: Wanted | None
) -> tuple[dict[str, dict[str, Any]], int]:
    """What is wanted of these arrays, and how many bytes were read for it."""
    entire = {
        group: {name: line for name, line in named.items() if not is_in_pieces(line)}
        for group, named in lines.items()
    }
    arrays, reader = read_arrays(path / "arrays", entire), Reader(path)

    def one(group: str, name: str, line: Mapping[str, Any]) -> Any:
        if name in entire[group]:
            array = arrays[group].pop(name)
            for what, found in describe(array).items():
                manifest.expect(path, f"{what} of array {group}/{name}", found, line[what])
            if wanted is None:
                return array
            reader.bytes += array.nbytes
        elif wanted is None:
            return reader.read(group, name, line, whole(line["shape"]))
        boxes = wanted.get(group, {}).get(name, [whole(line["shape"])])
        take = partial(reader.read, group, name, line) if is_in_pieces(line) else _taken(array)
        return Parts(tuple(line["shape"]), {box: take(box) for box in dict.fromkeys(boxes)})

    return {
        group: {name: one(group, name, line) for name, line in named.items()}
        for group, named in lines.items()
    }, reader.bytes


def _taken(array: np.ndarray) -> Callable[[Box], np.ndarray]:
    """Boxes of an array, in memory of their own."""
    return lambda box: array[(*box.slices, ...)].copy()


def _read_description(path: Path, step: int) -> tuple[int, dict[str, Any]]:
    with unless_replaced(path), told_as(f"checkpoint {path}"):
        return step, manifest.verified(path, step)["arrays"]
