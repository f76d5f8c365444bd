"""Files that a user gives, as settings: known by their content, so that a copy elsewhere is the
same.
"""

import hashlib
from pathlib import Path

from dsv3_jax.config.plain_json import check_plain


def hash_of(file: Path) -> str:
    """SHA-256 of its bytes, in hexadecimal. OSError for what is no plain file."""
    check_plain(file)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def text_of(file: Path) -> str:
    """Whether it is UTF-8 is told by who uses it. OSError for what is no plain file."""
    check_plain(file)
    return file.read_text("utf-8", "replace")
