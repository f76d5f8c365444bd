"""The folder of a run of synthesis: its settings, which may not change on the way, its journal, and
what is made of both in the end.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsv3_jax.files import replace_file
from dsv3_jax.posttrain.out_folder import SETTINGS, OutFolder, held_folder

JOURNAL = "candidates.jsonl"
SAMPLES, FATES_FILE = "samples.jsonl", "fates.jsonl"
REPORT, NUMBERS, PICTURE = "report.md", "report.json", "lengths.png"
ASKING, SELECTING = "asking", "selecting"  # what the two halves of the settings decide


class SynthesisFolder(OutFolder):
    """A folder that this process holds."""

    def own(self, found: Mapping[str, Any]) -> dict[str, Any] | None:
        halves = (found.get(half) for half in (ASKING, SELECTING))
        return dict(found) if all(isinstance(half, dict) for half in halves) else None

    def check(self, wanted: Mapping[str, Mapping[str, Any]], reselect: bool) -> None:
        """ValueError, which names an option, if it was begun with other settings; those that only
        select may differ if `reselect`.
        """
        self.check_same(self.stored[ASKING], wanted[ASKING])
        if not reselect:
            self.check_same(self.stored[SELECTING], wanted[SELECTING], " (or --reselect)")

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
    with held_folder(path):
        was_begun = True
        try:
            folder = SynthesisFolder(path)
            was_begun = folder.stored is not None
            yield folder
        finally:
            journal = path / JOURNAL
            has_answers = journal.exists() and journal.stat().st_size > 0
            # Where every prompt is contaminated, samples are written without an answer.
            if not (was_begun or has_answers or (path / SAMPLES).exists()):
                for name in (JOURNAL, SETTINGS):
                    (path / name).unlink(missing_ok=True)
