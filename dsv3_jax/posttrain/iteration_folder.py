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

from dsv3_jax.files import replace_file
from dsv3_jax.posttrain.out_folder import SETTINGS, OutFolder, held_folder

SAMPLES, DATA = "samples.jsonl", "data.jsonl"
CANDIDATES, HELD_OUT, RUN = "candidates.jsonl", "held_out.jsonl", "model"
REPORT, NUMBERS, PICTURE = "report.md", "report.json", "pass_rates.png"
_MARK = "expert iteration"  # of settings that are ours


class IterationFolder(OutFolder):
    """A folder that this process holds."""

    def own(self, found: Mapping[str, Any]) -> dict[str, Any] | None:
        return found[_MARK] if isinstance(found.get(_MARK), dict) else None

    def settle(self, wanted: Mapping[str, Any]) -> None:
        """Writes the settings of a new folder. ValueError, which names an option, if it was begun
        with others.
        """
        if self.stored is None:
            self.stored = json.loads(json.dumps(wanted))
            data = json.dumps({_MARK: self.stored}, indent=2) + "\n"
            replace_file(self.path / SETTINGS, data.encode())
        self.check_same(self.stored, wanted)

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
    with held_folder(path):
        yield IterationFolder(path)
