"""The folder of an expert iteration: its settings, and a folder for each round.

    settings.json              what it was begun with, which may not change on the way
    samples.jsonl              the data set so far, each sample with where it comes from
    round-000/held_out.jsonl   what the model to begin with makes of the held-out statements
    round-001/candidates.jsonl every attempt of the round, with its verdict, as it came
    round-001/samples.jsonl    what is new in the data set
    round-001/data.jsonl       what its fine-tuning reads
    round-001/model-001        the run of its fine-tuning
    round-001/held_out.jsonl   what the fine-tuned model makes of the held-out statements

All but journals and runs is written whole or not at all, and follows from the journals. So a stage
whose file is there is done, and there is no other record of how far the work has come.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsv3_jax.config.fields import shown
from dsv3_jax.config.plain_json import read_table
from dsv3_jax.files import held, replace_file

SETTINGS, SAMPLES, DATA = "settings.json", "samples.jsonl", "data.jsonl"
CANDIDATES, HELD_OUT, RUN = "candidates.jsonl", "held_out.jsonl", "model"
REPORT, NUMBERS, PICTURE = "report.md", "report.json", "pass_rates.png"
_MARK = "expert iteration"  # of settings that are ours


class IterationFolder:
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
            if isinstance(found.get(_MARK), dict):
                return found[_MARK]
            raise ValueError(f"{file}: no settings of this command")
        there = sorted(path.name for path in self.path.iterdir())
        if there:
            raise ValueError(
                f"--out {self.path} holds {there[0]}; allowed: a new or an empty folder, or one of "
                "this command"
            )
        return None

    def settle(self, wanted: Mapping[str, Any]) -> None:
        """Writes the settings of a new folder. ValueError, which names an option, if it was begun
        with others.
        """
        now = json.loads(json.dumps(wanted))
        if self.stored is None:
            data = json.dumps({_MARK: now}, indent=2) + "\n"
            replace_file(self.path / SETTINGS, data.encode())
            self.stored = now
        for name in sorted(self.stored.keys() | now.keys()):
            if self.stored.get(name) != now.get(name):
                raise ValueError(
                    f"--out {self.path} was begun with another {name}: "
                    f"{shown(self.stored.get(name))}, now {shown(now.get(name))}; allowed: the "
                    "same settings, or another folder"
                )

    def round(self, number: int) -> Path:
        """Its folder, which is made if need be."""
        place = self.path / f"round-{number:03d}"
        place.mkdir(exist_ok=True)
        return place


def runs_of(place: Path) -> tuple[Path | None, Path | None]:
    """Of a round: the run that has ended well, and one that was begun and can go on."""
    runs = sorted(place.glob(f"{RUN}-*"))
    ended = next((run for run in runs if (run / "result.json").is_file()), None)
    begun = next((run for run in runs if (run / "config.json").is_file()), None)
    return ended, begun


@contextlib.contextmanager
def iteration_folder(path: Path) -> Iterator[IterationFolder]:
    """Made if need be, and gone again if it ends before there are settings. Errors as of
    `IterationFolder`; ValueError if another process has it.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out {path} is a file; allowed: a new or an empty folder")
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        with held(path, ValueError(f"--out {path}: another process is writing there")):
            yield IterationFolder(path)
    finally:
        if is_new and not any(path.iterdir()):
            path.rmdir()
