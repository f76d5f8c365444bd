"""A run's folder: what lies where, how a new one is named, which one is resumed."""

import os
from dataclasses import dataclass
from pathlib import Path

from dsv3_jax.config import OutputConfig


@dataclass(frozen=True)
class RunFolder:
    """Paths within one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def picture(self) -> Path:
        return self.path / "curves.png"

    @property
    def sample(self) -> Path:
        return self.path / "sample.txt"

    @property
    def result(self) -> Path:
        return self.path / "result.json"


def new_run(cfg: OutputConfig) -> RunFolder:
    """A new run's folder, numbered one above the highest of its name. OSError if it
    cannot be written to.
    """
    parent = Path(cfg.folder)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        number = 1 + max((_number(path, cfg.name) for path in parent.iterdir()), default=0)
        while True:
            path = parent / f"{cfg.name}-{number:03d}"
            try:
                path.mkdir()
                return RunFolder(path)
            except FileExistsError:  # another run started at the same moment
                number += 1
    except OSError as error:
        raise OSError(f"output.folder {parent} cannot be written to: {error.strerror}") from error


def check_writable(cfg: OutputConfig) -> None:
    """OSError at once, not after the data were read, if a new run's folder cannot be made."""
    existing = Path(cfg.folder)
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise OSError(f"output.folder {cfg.folder} cannot be written to: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OSError(f"output.folder {cfg.folder} cannot be written to: Permission denied")


def find_run(parent: Path, wanted: str) -> RunFolder:
    """The run to resume: a folder of this path or of this name in `parent`, or the newest one for
    'newest'. ValueError if there is none.
    """
    if wanted != "newest":
        for path in (Path(wanted), parent / wanted):
            if (path / "config.json").is_file():
                return _writable(RunFolder(path))
        raise ValueError(f"--resume {wanted}: no run there (a run's folder holds config.json)")
    runs = [path.parent for path in parent.glob("*/config.json")]
    if not runs:
        raise ValueError(f"--resume: no run in {parent}; start one without --resume")
    return _writable(RunFolder(max(runs, key=lambda run: (run / "config.json").stat().st_mtime_ns)))


def _writable(run: RunFolder) -> RunFolder:
    if not os.access(run.path, os.W_OK | os.X_OK):
        raise OSError(f"--resume {run.path}: the folder cannot be written to")
    return run


def _number(path: Path, name: str) -> int:
    head, _, tail = path.name.rpartition("-")
    return int(tail) if head == name and tail.isdecimal() else 0
