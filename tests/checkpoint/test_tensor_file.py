"""A header that the format does not allow is refused: bytes belong to one tensor each."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.checkpoint.tensor_file import Spec, read_header, write_file

SPEC = Spec(np.dtype(np.float32), (2, 3))


def two(path: Path, change: Callable[[dict], str | None]) -> Path:
    """Tensors a and b, with another header of the same bytes."""
    write_file(path, {"a": SPEC, "b": SPEC}, ((n, np.zeros((2, 3), np.float32)) for n in "ab"))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = (change(header) or json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return path


def test_what_was_written_is_read(tmp_path: Path):
    found = read_header(two(tmp_path / "x", lambda header: None))
    assert [(name, tensor.spec) for name, tensor in found.items()] == [("a", SPEC), ("b", SPEC)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h: h["b"].update(data_offsets=[0, 24]), "b overlaps another tensor"),
        (lambda h: h["b"].update(data_offsets=[23, 47]), "b overlaps another tensor"),
        (lambda h: h["b"].update(data_offsets=[25, 49]), "b comes after a hole"),
        (lambda h: h["a"].update(data_offsets=[48, 72]), "b comes after a hole"),
        (lambda h: h["b"].update(data_offsets=[24.0, 48.0]), "b has shape"),
        (lambda h: h["b"].update(data_offsets=[24, 0]), "b is F32"),
        (lambda h: h["b"].update(shape=["2", 3]), "b has shape"),
        (lambda h: h["b"].update(shape=[-2, -3]), "b has shape"),
        (lambda h: h["b"].update(shape=[float("inf")]), "JSON has no Infinity"),
        (lambda h: json.dumps(h).replace('"b"', '"a"'), "a stands there twice"),
    ],
)
def test_a_header_of_another_kind_is_refused(tmp_path: Path, change: Callable, said: str):
    with pytest.raises(ValueError, match=rf"x: not readable as safetensors: {said}") as error:
        read_header(two(tmp_path / "x", change))
    assert "\n" not in str(error.value)
