"""The folder of a run of synthesis: its settings, which may not change on the way, its journal, and
what is made of both in the end.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsv3_jax.config.fields import shown
from dsv3_jax.config.plain_json import read_table
from dsv3_jax.files import held, replace_file

SETTINGS, JOURNAL = "settings.json", "candidates.jsonl"
SAMPLES, FATES_FILE = "samples.jsonl", "fates.jsonl"
REPORT, NUMBERS, PICTURE = "report.md", "report.json", "lengths.png"
ASKING, SELECTING = "asking", "selecting"  # what the two halves of the settings decide


class SynthesisFolder:
    """A folder that this process holds."""

    def __init__(self, path: Path) -> None:
        """ValueError or OSError, one line, for a folder of something else."""
        self.path = path
        self.stored = self._stored()
        """Its settings; None if it is new"""

    def _stored(self) -> dict[str, Any] | None:
        file = self.path / SETTINGS
        if file.is_file():
            found = read_table(file)
            if all(isinstance(found.get(half), dict) for half in (ASKING, SELECTING)):
                return found
            raise ValueError(f"{file}: no settings of this command")
        there = sorted(path.name for path in self.path.iterdir())
        if there:
            raise ValueError(
                f"--out {self.path} holds {there[0]}; allowed: a new or an empty folder, or one of "
                "this command"
            )
        return None

    def check(self, wanted: Mapping[str, Mapping[str, Any]], reselect: bool) -> None:
        """ValueError, which names an option, if it was begun with other settings; those that only
        select may differ if `reselect`.
        """
        for half in (ASKING, *(() if reselect else (SELECTING,))):
            before, now = (json.loads(json.dumps(one[half])) for one in (self.stored, wanted))
            for name in sorted(before.keys() | now.keys()):
                if before.get(name) != now.get(name):
                    more = " (or --reselect)" if half == SELECTING else ""
                    raise ValueError(
                        f"--out {self.path} was begun with another {name}: "
                        f"{shown(before.get(name))}, now {shown(now.get(name))}; allowed: the same "
                        f"settings, or another folder{more}"
                    )

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Of this run, from now on."""
        kept = {"samples": []} | (self.stored or {}) | dict(settings)
        replace_file(self.path / SETTINGS, (json.dumps(kept, indent=2) + "\n").encode())
        self.stored = kept

    def check_samples(self) -> None:
        """ValueError if samples were written by this command and changed since: a person's verdicts
        would be lost.
        """
        file = self.path / SAMPLES
        if file.exists() and _hash(file.read_bytes()) not in (self.stored or {}).get("samples", ()):
            raise ValueError(
                f"{file} was changed since it was written; allowed: move it, and give it as "
                "--reviewed if it holds people's verdicts"
            )

    def write_samples(self, data: bytes) -> None:
        """Whole, or the ones before stay."""
        file = self.path / SAMPLES
        hashes = [_hash(data)] + ([_hash(file.read_bytes())] if file.exists() else [])
        self.write_settings({"samples": hashes})  # whichever of them a crash leaves is ours
        replace_file(file, data)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def synthesis_folder(path: Path) -> Iterator[SynthesisFolder]:
    """Made if need be, and as it was before if it ends before the first answer. Errors as of
    `SynthesisFolder`; ValueError if another process has it.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out {path} is a file; allowed: a new or an empty folder")
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    was_begun = True
    try:
        taken = ValueError(f"--out {path}: another process is writing there")
        with held(path, taken):
            folder = SynthesisFolder(path)
            was_begun = folder.stored is not None
            yield folder
    finally:
        journal = path / JOURNAL
        if not was_begun and not (journal.exists() and journal.stat().st_size):
            for name in (JOURNAL, SETTINGS):
                (path / name).unlink(missing_ok=True)
        if is_new and not any(path.iterdir()):
            path.rmdir()
