"""Stopping what the store of checkpoints does, at every place where it changes the disk.

A *kill* lets a step of the store happen halfway or not at all, and nothing after it: no clean-up
code reaches the disk any more. A *failure* is one error of the file system, after which it works.
Here arrays are one .npz file a group instead of Orbax's folder, at a tenth of the time.
"""

import itertools
import os
import shutil
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3_jax import files
from dsv3_jax.checkpoint import store
from dsv3_jax.checkpoint.store import CheckpointError

Action = Callable[[Path], Any]


class Killed(BaseException):
    """Stands for SIGKILL: no `except Exception` stops it."""


def arrays(version: int) -> dict[str, dict[str, np.ndarray]]:
    return {"params": {"w": np.full(2000, version, np.int32)}, "mu": {"w": np.ones(3) * version}}


def save(folder: Path, step: int, version: int) -> None:
    store.save(folder, step, arrays(version), {"version": version})


def load(folder: Path, step: int | None = None) -> tuple[int, int]:
    """Returns step and version of what is loaded; any report of damage is a failure."""
    reports: list[str] = []
    found = store.load(folder, step, report=reports.append)
    assert reports == []
    version = found.meta["version"]
    for group, named in arrays(version).items():
        np.testing.assert_array_equal(found.arrays[group]["w"], named["w"])
    return found.step, version


def write_npz(folder: Path, groups: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    folder.mkdir()
    for group, named in groups.items():
        np.savez(folder / f"{group}.npz", **named)


def read_npz(folder: Path, described: Mapping[str, Mapping[str, Any]]) -> Any:
    return {group: dict(np.load(folder / f"{group}.npz")) for group in described}


def two_steps(folder: Path) -> Path:
    for step in (1, 2):
        save(folder, step, version=1)
    return folder


# --- stopping at a place -------------------------------------------------------------------------


class Stop:
    """Counts the store's changes to the disk, and stops the one numbered `at`."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, failure: OSError | None = None) -> None:
        self.at, self.failure, self.count, self.places = at, failure, 0, []
        names = ("makedirs", "rename", "replace", "unlink")
        watched = {name: self.watch(name, getattr(os, name)) for name in names}
        watched["fsync"] = self.watch("fsync", lambda _: None)  # a place, but no wait for the disk
        for module in (store, files):
            patch.setattr(module, "os", types.SimpleNamespace(**{**vars(os), **watched}))
        rmtree = self.watch("rmtree", shutil.rmtree, half_rmtree)
        patch.setattr(store, "shutil", types.SimpleNamespace(rmtree=rmtree))
        write_arrays, write_file = store.write_arrays, store._write_file
        patch.setattr(
            store, "write_arrays", self.watch("write_arrays", write_arrays, half_write_arrays)
        )
        patch.setattr(store, "_write_file", self.watch("write", write_file, half_write_file))

    @property
    def stopped(self) -> bool:
        return self.count > self.at

    def watch(self, name: str, real: Action, half: Action | None = None) -> Action:
        def watched(*args: Any, **kwargs: Any) -> Any:
            place, self.count = self.count, self.count + 1
            self.places.append(name)
            if place == self.at and half is not None:
                half(*args)
            if place == self.at or (place > self.at and self.failure is None):
                raise self.failure or Killed
            return real(*args, **kwargs)

        return watched


def half_rmtree(path: Path) -> None:
    for file in sorted(p for p in Path(path).rglob("*") if p.is_file())[::2]:
        file.unlink()


def half_write_arrays(folder: Path, groups: Any) -> None:
    write_npz(folder, groups)
    half_rmtree(folder)


def half_write_file(path: Path, content: bytes) -> None:
    path.write_bytes(content[: len(content) // 2])


def sweep(
    saved: Path,
    copies: Path,
    monkeypatch: pytest.MonkeyPatch,
    action: Action,
    failure: OSError | None = None,
) -> "list[tuple[Path, str | None]]":
    """Stops `action` at each of its places in turn; returns each folder and error message."""
    outcomes: list[tuple[Path, str | None]] = []
    for at in itertools.count():
        folder = shutil.copytree(saved, copies / f"at{at:03d}")
        message = None
        with monkeypatch.context() as patch:
            stop = Stop(patch, at, failure)
            try:
                action(folder)
            except (Killed, CheckpointError) as error:
                message = str(error)
        if not stop.stopped:
            assert message is None
            return outcomes
        outcomes.append((folder, message))
    raise AssertionError("unreachable")
