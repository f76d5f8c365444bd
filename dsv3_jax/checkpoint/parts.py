"""Arrays in pieces: what each process of a run writes of them and reads of them.

A process writes its pieces to one file of its own beside the others', in safetensors' format: a
piece is then found and read without any other, and no process waits for another one. In the
manifest an array's line says where its pieces lie and what their checksums are.

Orbax is not used for this: it writes host arrays in process 0 alone, refuses device arrays that no
other process knows of, and lets all processes wait for each other.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax.checkpoint.arrays import CheckpointError, describe
from dsv3_jax.checkpoint.boxes import Box, box_of, whole
from dsv3_jax.checkpoint.tensor_file import CODES, Spec, Tensor, read_header, write_file


class Piece(NamedTuple):
    """A part of an array that one process owns."""

    shape: tuple[int, ...]
    """Of the whole array"""
    starts: tuple[int, ...]
    """Where in it the piece begins"""
    array: np.ndarray


class Parts:
    """An array of which this process has some boxes."""

    def __init__(self, shape: tuple[int, ...], boxes: Mapping[Box, np.ndarray]) -> None:
        self.shape, self.boxes = shape, boxes

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """One of the boxes, by slices of all dimensions."""
        return self.boxes[box_of(index, self.shape)]


# --- writing -------------------------------------------------------------------------------------


def write_part(folder: Path, number: int, groups: Mapping[str, Mapping[str, Sequence[Piece]]]):
    """Writes the pieces of process `number`, and beside them what the manifest is to say of them.

    CheckpointError for a dtype that the format has not.
    """
    pieces = {
        f"{group}/{name}@{','.join(map(str, piece.starts))}": (group, name, piece)
        for group, named in groups.items()
        for name, own in named.items()
        for piece in own
    }
    for key, (_, _, piece) in pieces.items():
        if piece.array.dtype not in CODES:
            raise CheckpointError(f"array {key}: dtype {piece.array.dtype} in several processes")
    specs = {key: Spec(p.array.dtype, p.array.shape) for key, (_, _, p) in pieces.items()}
    write_file(_file(folder, number), specs, ((key, p.array) for key, (_, _, p) in pieces.items()))
    lines = [
        (group, name, piece.shape, {"at": piece.starts, "file": number, **describe(piece.array)})
        for group, name, piece in pieces.values()
    ]
    _lines_file(folder, number).write_text(json.dumps(lines))


def joined(folder: Path, processes: int) -> dict[str, dict[str, dict[str, Any]]]:
    """The manifest's lines of all arrays, from what every process left beside its pieces.

    CheckpointError if pieces are missing, or overlap, or lie outside of their array.
    """
    arrays: dict[str, dict[str, dict[str, Any]]] = {}
    for number in range(processes):
        file = _lines_file(folder, number)
        for group, name, shape, piece in json.loads(file.read_text()):
            new = {"shape": shape, "dtype": piece.pop("dtype"), "pieces": []}
            arrays.setdefault(group, {}).setdefault(name, new)["pieces"].append(piece)
        file.unlink()
    for group, named in arrays.items():
        for name, line in named.items():
            fault = _fault(line)
            if fault:
                raise CheckpointError(f"array {group}/{name}: {fault}")
    return arrays


def _fault(line: Mapping[str, Any]) -> str | None:
    """Of the pieces that should make an array."""
    boxes, shape = [Box(p["at"], p["shape"]) for p in line["pieces"]], line["shape"]
    found = sum(box.size for box in boxes)
    if found != whole(shape).size:
        return f"pieces of {found} elements for shape {shape}"
    return None if _tile(boxes, whole(shape)) else f"pieces overlap, or leave shape {shape}"


def _tile(boxes: Sequence[Box], area: Box) -> bool:
    """Whether each element of `area` is in one of the boxes, none in two, and no other in any.

    Boxes need not be compared with each other: how many cover an element is known from its
    differences along all axes, which are zero but at corners, where they are 1 or -1 for each box.
    """
    corners: Counter[tuple[int, ...]] = Counter()
    for box, weight in (*((box, 1) for box in boxes), (area, -1)):
        ends = [((at, 1), (at + size, -1)) for at, size in zip(*box, strict=True)]
        for corner in product(*ends):
            place = tuple(at for at, _ in corner)
            corners[place] += weight * math.prod(sign for _, sign in corner)
    return not any(corners.values())


def _file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.safetensors"


def _lines_file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.json"


# --- reading -------------------------------------------------------------------------------------


class Reader:
    """Of one checkpoint's files of pieces."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes = 0
        """Read so far"""
        self._headers: dict[int, dict[str, Tensor]] = {}

    def read(self, group: str, name: str, line: Mapping[str, Any], box: Box) -> np.ndarray:
        """A box of an array, from the pieces that have some of it, whose checksums are verified.

        CheckpointError for what is damaged or missing, or there twice.
        """
        found = np.empty(box.shape, line["dtype"])
        filled: list[Box] = []
        for piece in line["pieces"]:
            there = Box(tuple(piece["at"]), tuple(piece["shape"]))
            inside = there.within(box)
            if inside is None:
                continue
            array = self._verified(group, name, line["dtype"], piece)
            found[inside.slices] = array[box.within(there).slices]
            filled.append(inside)
        if not _tile(filled, whole(box.shape)):
            raise CheckpointError(
                f"{self.folder}: array {group}/{name} has a gap, or pieces that overlap"
            )
        return found

    def _verified(self, group: str, name: str, dtype: str, piece: Mapping[str, Any]) -> np.ndarray:
        key = f"{group}/{name}@{','.join(map(str, piece['at']))}"
        array = self._header(piece["file"]).get(key)
        if array is None:
            raise CheckpointError(f"{self.folder}: no {key} in part {piece['file']}")
        values = array.read()
        self.bytes += values.nbytes
        expected = {"shape": piece["shape"], "dtype": dtype, "crc32": piece["crc32"]}
        for what, is_now in describe(values).items():
            if is_now != expected[what]:
                raise CheckpointError(
                    f"checkpoint {self.folder}: {what} of {key} is {is_now}, should be "
                    f"{expected[what]}"
                )
        return values

    def _header(self, number: int) -> dict[str, Tensor]:
        if number not in self._headers:
            try:
                self._headers[number] = read_header(_file(self.folder, number))
            except ValueError as error:
                raise CheckpointError(str(error)) from error
        return self._headers[number]


def is_in_pieces(line: Any) -> bool:
    """Whether a manifest's line of an array says where its pieces are."""
    return set(line) == {"shape", "dtype", "pieces"} and all(
        set(p) == {"at", "file", "shape", "crc32"} and type(p["file"]) is int
        for p in line["pieces"]
    )
