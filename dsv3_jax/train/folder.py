"""A run's folder: what lies where, how a new one is named, which one is resumed."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dsv3_jax.config import OutputConfig
from dsv3_jax.files import held


@dataclass(frozen=True)
class RunFolder:
    """Paths within one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def tokenizer(self) -> Path:
        from dsv3_jax.data.tokenizer import find_tokenizer  # brings NumPy, not for --help

        return find_tokenizer(self.path) or self.path / "tokenizer.json"

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
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def sample(self) -> Path:
        return self.path / "sample.txt"

    @property
    def result(self) -> Path:
        return self.path / "result.json"


@contextlib.contextmanager
def new_run(cfg: OutputConfig) -> Iterator[RunFolder]:
    """Makes a new run's folder; it is gone again if what the block does with it fails."""
    run = _made(cfg)
    try:
        yield run
    except BaseException:
        shutil.rmtree(run.path, ignore_errors=True)
        raise


def _made(cfg: OutputConfig) -> RunFolder:
    """A new folder, numbered one above the highest of its name. OSError if it cannot be made."""
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


def locked(run: RunFolder) -> contextlib.AbstractContextManager[None]:
    """Holds a run's folder for this process until it ends. OSError if another one has it."""
    return held(run.path, OSError(f"{run.path}: another process is training this run"))


def check_writable(cfg: OutputConfig) -> None:
    """OSError at once, not after the data were read, if a new run's folder cannot be made."""
    existing = Path(cfg.folder)
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise OSError(f"output.folder {cfg.folder} cannot be written to: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OSError(f"output.folder {cfg.folder} cannot be written to: Permission denied")


def run_at(parent: Path, wanted: str, flag: str) -> RunFolder:
    """The run of this path, or of this name in `parent`. ValueError if `flag` finds none."""
    for given in (Path(wanted), parent / wanted):
        for path in (given, given.parent, given.parent.parent):  # its checkpoints, or one of them
            if wanted and (path / "config.json").is_file():
                return RunFolder(path)
    kinds = "a run's folder" if flag == "--resume" else "a folder of a run or of Hugging Face"
    raise ValueError(f"{flag} {wanted}: no run there ({kinds} holds config.json)")


def find_run(parent: Path, wanted: str) -> RunFolder:
    """The run to resume: `run_at`, or the newest one for 'newest'. ValueError if there is none."""
    if wanted != "newest":
        return _writable(run_at(parent, wanted, "--resume"))
    runs = [path.parent for path in parent.glob("*/config.json")]
    if not runs:
        raise ValueError(f"--resume: no run in {parent}; start one without --resume")
    newest = max(runs, key=lambda run: (_was_saved(run), _begun(run)))
    return _writable(RunFolder(newest))


def _was_saved(run: Path) -> bool:
    """A run that was given up before its first checkpoint is not what anybody wants to go on."""
    return any(run.glob("checkpoints/step_*/COMMITTED"))


def _begun(run: Path) -> int:
    return (run / "config.json").stat().st_mtime_ns


def _writable(run: RunFolder) -> RunFolder:
    if not os.access(run.path, os.W_OK | os.X_OK):
        raise OSError(f"--resume {run.path}: the folder cannot be written to")
    return run


def _number(path: Path, name: str) -> int:
    head, _, tail = path.name.rpartition("-")
    return int(tail) if head == name and tail.isdecimal() else 0
