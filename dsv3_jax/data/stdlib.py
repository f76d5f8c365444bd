"""The default corpus: the source code of Python's standard library (no section of the report).

Real text that every interpreter brings along, about 10 MB of it, and nothing to download.
"""

import os
import sysconfig
from pathlib import Path

_SKIPPED_FOLDERS = frozenset(
    ("test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__")
)
# Written when an interpreter is built: full of that machine's paths, and no two builds agree.
_BUILD_OUTPUT = ("_sysconfigdata", "config-")


def stdlib_files() -> dict[Path, str]:
    """Path -> name relative to the library. ValueError if there are none."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = filter(_is_library, subfolders)
        for name in filter(_is_library, names):
            path = Path(folder, name)
            if path.suffix == ".py":
                found[path] = path.relative_to(root).as_posix()
    if not found:
        raise ValueError(f"data.source 'stdlib': no Python source in {root}")
    return found


def _is_library(name: str) -> bool:
    return name not in _SKIPPED_FOLDERS and not name.startswith(_BUILD_OUTPUT)
