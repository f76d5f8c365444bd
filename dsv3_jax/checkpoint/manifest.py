"""A checkpoint's `manifest.json`: what it says of step, meta and every array, and whether the files
agree with it (see `store.py`).

Format 1 has whole arrays, each with its checksum; format 2 pieces of arrays, each with its place,
file and checksum.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3_jax.checkpoint.arrays import DTYPES, CheckpointError, crc32
from dsv3_jax.checkpoint.listing import MARKER
from dsv3_jax.checkpoint.parts import is_in_pieces
from dsv3_jax.config.plain_json import check_plain, parse_json

FORMAT, PIECES_FORMAT = 1, 2
Lines = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Group -> name -> what the manifest says of an array"""
_LINE = {"shape", "dtype", "crc32"}


def described_by(
    step: int, lines: Lines, meta: dict[str, Any], number: int = FORMAT
) -> tuple[bytes, bytes]:
    """Returns meta and manifest as they are written: a function of step, arrays and meta alone."""
    meta_bytes = _to_json("meta", meta)
    manifest = {"format": number, "step": int(step), "meta": crc32(meta_bytes), "arrays": lines}
    return meta_bytes, _to_json("manifest", manifest)


def _to_json(what: str, value: Any) -> bytes:
    try:
        return json.dumps(value, sort_keys=True, indent=1, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{what} of a checkpoint must be JSON: {error}") from error


def verified(path: Path, step: int) -> dict[str, Any]:
    """Returns a committed folder's manifest; raises `CheckpointError` if it is not that of its
    marker and its step.
    """
    text, marker = content(path, "manifest.json"), content(path, MARKER)
    expect(path, "CRC-32 of manifest.json", crc32(text), marker.decode(errors="replace"))
    try:
        manifest = parse_json(text)
        number = manifest["format"]
        if number not in (FORMAT, PIECES_FORMAT):
            raise CheckpointError(
                f"checkpoint {path}: format is {number}, should be {FORMAT} or {PIECES_FORMAT}"
            )
        expect(path, "step", manifest["step"], step)
        lines = [line for named in manifest["arrays"].values() for line in named.values()]
        is_line = is_in_pieces if number == PIECES_FORMAT else _is_whole
        whole = all(is_line(line) and _is_spec(line) for line in lines)
    except CheckpointError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError):
        whole = False
    if not whole or "meta" not in manifest:
        raise CheckpointError(f"checkpoint {path}: manifest.json is none of this format")
    return manifest


def _is_whole(line: Mapping[str, Any]) -> bool:
    return set(line) == _LINE


def _is_spec(line: Mapping[str, Any]) -> bool:
    return line["dtype"] in DTYPES and all(type(n) is int and n >= 0 for n in line["shape"])


def content(path: Path, name: str) -> bytes:
    """Bytes of a file of a checkpoint, which no name may make another kind of file."""
    check_plain(path / name)
    return (path / name).read_bytes()


def expect(path: Path, what: str, found: Any, expected: Any) -> None:
    """`CheckpointError` unless both are equal."""
    if found != expected:
        raise CheckpointError(f"checkpoint {path}: {what} is {found}, should be {expected}")
