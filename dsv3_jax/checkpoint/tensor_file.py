"""One .safetensors file: its header, its tensors in place on disk, and writing one by one.

The safetensors package knows no FP8 for NumPy and writes a file from all its tensors at once; the
format is small: the header's length in 8 bytes, a JSON header, the bytes. Its own reader checks
ours in the tests.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dsv3_jax.config.plain_json import check_plain, parse_json

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    "BOOL": np.dtype(bool),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 10**8  # bytes, the format's own limit


class Spec(NamedTuple):
    """What a tensor is, without its values."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return self.dtype.itemsize * math.prod(self.shape)

    def __str__(self) -> str:
        return f"{CODES[self.dtype]} {list(self.shape)}"


class Tensor(NamedTuple):
    """A tensor in a file."""

    file: Path
    offset: int
    spec: Spec

    def read(self) -> np.ndarray:
        """Its values in place: pages of the file, which the system may drop at any time."""
        if not self.spec.size:
            return np.empty(self.spec.shape, self.spec.dtype)
        pages = np.memmap(self.file, np.uint8, "r", self.offset, (self.spec.size,))
        return np.asarray(pages).view(self.spec.dtype).reshape(self.spec.shape)


def read_header(file: Path) -> dict[str, Tensor]:
    """Every tensor of a file by name. ValueError if the file is cut off or not of this format."""
    try:
        check_plain(file)
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > _MAX_HEADER:
                raise ValueError("no safetensors header")
            if size < 8 + length:
                raise ValueError(f"truncated: {size} bytes, its header alone has {8 + length}")
            header = parse_json(stream.read(length))
        tensors = _tensors(file, header, 8 + length)
    except OSError as error:
        raise OSError(f"{file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not readable as safetensors: {error}") from error
    needed = max((t.offset + t.spec.size for t in tensors.values()), default=8 + length)
    if size != needed:
        what = "truncated" if size < needed else "longer than its header says"
        raise ValueError(f"{file}: {what}: {size} bytes, should be {needed}")
    return tensors


def _tensors(file: Path, header: dict[str, Any], start: int) -> dict[str, Tensor]:
    tensors = {}
    for name, described in header.items():
        if name == "__metadata__":
            continue
        code = described["dtype"]
        if code not in DTYPES:
            raise ValueError(f"{name} has dtype {code}; known: {', '.join(DTYPES)}")
        shape, (begin, end) = described["shape"], described["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise ValueError(f"{name} has shape {shape} and data_offsets {[begin, end]}")
        spec = Spec(DTYPES[code], tuple(shape))
        if end - begin != spec.size:
            raise ValueError(f"{name} is {spec}, but has {end - begin} bytes")
        tensors[name] = Tensor(file, start + begin, spec)
    _check_gapless(tensors, start)
    return tensors


def _check_gapless(tensors: Mapping[str, Tensor], start: int) -> None:
    """The format has neither holes nor bytes that belong to two tensors."""
    end = start
    for name, tensor in sorted(
        tensors.items(), key=lambda item: (item[1].offset, item[1].spec.size)
    ):
        if tensor.offset != end:
            what = "overlaps another tensor" if tensor.offset < end else "comes after a hole"
            raise ValueError(f"{name} {what}")
        end += tensor.spec.size


@contextlib.contextmanager
def _named(file: Path) -> Iterator[None]:
    """A full disk does not say in which file."""
    try:
        yield
    except OSError as error:
        error.filename = str(file)
        raise


def write_file(
    file: Path, specs: Mapping[str, Spec], arrays: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Writes a file as its tensors come, in the order of `specs`, and syncs it.

    OSError where that fails, the disk being full for one.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0  # transformers asks for the mark
    for name, spec in specs.items():
        header[name] = {
            "dtype": CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.size],
        }
        end += spec.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with _named(file), file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for (name, spec), (given, array) in zip(specs.items(), arrays, strict=True):
            assert (given, spec) == (name, Spec(array.dtype, array.shape)), (given, name, spec)
            stream.write(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
        stream.flush()
        os.fsync(stream.fileno())
