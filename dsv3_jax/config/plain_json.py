"""JSON that others wrote: every fault is one line, a ValueError or an OSError."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def parse_json(
    text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """What `json.loads` returns; `pairs` makes an object of its names and values, in order.

    ValueError for what is no JSON or no UTF-8, and for brackets nested beyond Python's stack.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(file: Path) -> Any:
    """What a UTF-8 file holds. ValueError for its content, OSError for what is no plain file: to
    read from a pipe would be to wait for whoever writes to it.
    """
    if file.exists() and not file.is_file():
        raise OSError(None, "not a plain file", str(file))
    return parse_json(file.read_text(encoding="utf-8"))
