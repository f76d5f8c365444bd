"""Pieces of arrays lie side by side: none is missing, none over another."""

import json
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.checkpoint.arrays import CheckpointError
from dsv3_jax.checkpoint.boxes import Box, whole
from dsv3_jax.checkpoint.parts import Piece, Reader, joined, write_part


def lines_of(folder: Path, values: np.ndarray, boxes: Iterable[Box]) -> dict:
    """The manifest's line of an array of which every box is a process's piece."""
    boxes = list(boxes)
    for number, box in enumerate(boxes):
        piece = Piece(values.shape, box.starts, values[box.slices])
        write_part(folder, number, {"params": {"w": [piece]}})
    return joined(folder, len(boxes))["params"]["w"]


def test_pieces_of_any_form_are_read_as_one(tmp_path: Path):
    """Around one in the middle no straight cut parts them."""
    values = np.arange(18.0).reshape(3, 3, 2)
    starts, shapes = [(0, 0), (0, 2), (2, 1), (1, 0), (1, 1)], [(1, 2), (2, 1), (1, 2), (2, 1)]
    boxes = [Box((*s, 0), (*n, 2)) for s, n in zip(starts, [*shapes, (1, 1)], strict=True)]
    line, reader = lines_of(tmp_path, values, boxes), Reader(tmp_path)
    for box in (whole(values.shape), Box((1, 1, 0), (2, 2, 1)), Box((0, 0, 0), (0, 3, 2))):
        np.testing.assert_array_equal(reader.read("params", "w", line, box), values[box.slices])


def test_a_number_is_one_piece(tmp_path: Path):
    line = lines_of(tmp_path, np.array(3.0), [Box((), ())])
    assert Reader(tmp_path).read("params", "w", line, Box((), ())) == 3


@pytest.mark.parametrize(
    ("boxes", "line"),
    [
        ([Box((0,), (2,))], "pieces of 2 elements for shape [4]"),
        ([Box((0,), (2,)), Box((1,), (2,))], "pieces overlap, or leave shape [4]"),
        ([Box((0,), (3,)), Box((0,), (1,))], "pieces overlap, or leave shape [4]"),
    ],
    ids=["missing", "overlapping", "within another"],
)
def test_pieces_that_do_not_make_an_array_are_refused(tmp_path: Path, boxes: list, line: str):
    with pytest.raises(CheckpointError) as told:
        lines_of(tmp_path, np.arange(4.0), boxes)
    assert str(told.value) == f"array params/w: {line}"


def test_pieces_that_overlap_are_not_read(tmp_path: Path):
    """As many elements as are asked for, and memory that nobody wrote among them."""
    values = np.arange(4.0)
    pieces = [Piece((4,), (at,), values[at : at + 2]) for at in (0, 1)]
    write_part(tmp_path, 0, {"params": {"w": pieces}})
    told = [piece for *_, piece in json.loads((tmp_path / "part-00000.json").read_text())]
    line, reader = {"shape": [4], "dtype": "float64", "pieces": told}, Reader(tmp_path)
    np.testing.assert_array_equal(reader.read("params", "w", line, Box((0,), (1,))), values[:1])
    with pytest.raises(CheckpointError, match=r"array params/w has a gap, or pieces that overlap"):
        reader.read("params", "w", line, whole((4,)))


def test_thousands_of_pieces_are_no_burden(tmp_path: Path):
    values = np.zeros((100, 100))
    pieces = [Piece(values.shape, (r, c), values[:1, :1]) for r in range(100) for c in range(100)]
    write_part(tmp_path, 0, {"params": {"w": pieces}})
    begin = time.process_time()
    assert len(joined(tmp_path, 1)["params"]["w"]["pieces"]) == 10_000
    assert time.process_time() - begin < 5
