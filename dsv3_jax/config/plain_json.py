"""JSON and text that others wrote: every fault is one line, a ValueError or an OSError."""

import errno
import json
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn


def parse_json(text: str | bytes) -> Any:
    """What `json.loads` returns.

    ValueError for what is no JSON (Python would take NaN and Infinity), for a name that an object
    has twice, of which readers take one or the other, and for brackets beyond Python's stack.
    """
    try:
        return json.loads(text, object_pairs_hook=_each_once, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{name} stands there twice")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"JSON has no {constant}; allowed: finite numbers and null")


def read_json(file: Path) -> Any:
    """What a UTF-8 file holds. ValueError for its content, OSError for what is no plain file."""
    check_plain(file)
    return parse_json(file.read_text(encoding="utf-8"))


def read_table(file: Path) -> dict[str, Any]:
    """An object of JSON. The errors of `read_json` with the file's name, one line each."""
    try:
        content = read_json(file)
    except OSError as error:
        raise OSError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: no table of fields")
    return content


def read_text(file: Path) -> str:
    """OSError as of `check_plain`, or if it cannot be read; ValueError for what is no UTF-8."""
    check_plain(file)
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: byte {error.start} is no UTF-8") from None


def check_plain(file: Path) -> None:
    """OSError for a pipe or a device: to read it would be to wait for whoever writes to it."""
    if file.exists() and not file.is_file():
        raise OSError(errno.EINVAL, "not a plain file", str(file))
