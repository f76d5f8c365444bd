"""Lines of files that people wrote, and the JSON in them: a fault is told with file and line."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv3_jax.config.plain_json import check_plain, parse_json


def numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Every line, from 1, without its end. ValueError, one line, for what is no UTF-8; OSError for
    a file that cannot be read.
    """
    check_plain(file)
    content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            byte = line[error.start]
            raise ValueError(f"{file} line {number}: byte {byte:#04x} is not UTF-8") from None


def json_of(line: str) -> Any:
    """ValueError, one line, for what is no JSON, or none that can be read: a name twice, brackets
    too deep, numbers too long.
    """
    try:
        return parse_json(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:
        raise ValueError(f"no JSON that can be read: {error}") from None
