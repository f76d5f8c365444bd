"""Folders (`--out`) of commands that go on where they ended: held by one process, and known by
settings that may not change on the way.
"""

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsv3_jax.config.fields import shown
from dsv3_jax.config.plain_json import read_table
from dsv3_jax.files import held, is_part

SETTINGS = "settings.json"


class OutFolder(ABC):
    """A folder that this process holds. Commands override what their settings look like."""

    def __init__(self, path: Path) -> None:
        """ValueError or OSError, one line, for a folder of something else."""
        self.path = path
        self.stored = self._stored()
        """Its settings; None if it is new"""
        for left in [*filter(is_part, path.iterdir())]:  # of a process that was killed
            left.unlink()

    @abstractmethod
    def own(self, found: Mapping[str, Any]) -> dict[str, Any] | None:
        """What of a settings file's content are the settings; None if it is another command's."""

    def _stored(self) -> dict[str, Any] | None:
        file = self.path / SETTINGS
        if file.is_file():
            settings = self.own(read_table(file))
            if settings is not None:
                return settings
            raise ValueError(f"{file}: no settings of this command")
        there = sorted(path.name for path in self.path.iterdir() if not is_part(path))
        if there:
            raise ValueError(
                f"--out {self.path} holds {there[0]}; allowed: a new or an empty folder, or one of "
                "this command"
            )
        return None

    def check_same(self, before: Mapping[str, Any], now: Mapping[str, Any], more: str = "") -> None:
        """ValueError, which names an option, if settings differ; `more` stands behind it."""
        before, now = (json.loads(json.dumps(one)) for one in (before, now))
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"--out {self.path} was begun with another {name}: "
                    f"{shown(before.get(name))}, now {shown(now.get(name))}; allowed: the same "
                    f"settings, or another folder{more}"
                )


@contextlib.contextmanager
def held_folder(path: Path) -> Iterator[None]:
    """Made if need be, and gone again if it is left empty. ValueError for a file, and if another
    process has it.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out {path} is a file; allowed: a new or an empty folder")
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        with held(path, ValueError(f"--out {path}: another process is writing there")):
            yield
    finally:
        if is_new and not any(path.iterdir()):
            path.rmdir()
