"""Checkpoints without Orbax."""

import os
import time
import types
from pathlib import Path

import pytest

from dsv3_jax import files
from dsv3_jax.checkpoint import store
from tests.kills import read_npz, two_steps, write_npz


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Steps 1 and 2 in version 1, without Orbax."""
    monkeypatch.setattr(store, "write_arrays", write_npz)
    monkeypatch.setattr(store, "read_arrays", read_npz)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between tries to remove a folder
    for module in (store, files):
        quick = types.SimpleNamespace(**{**vars(os), "fsync": lambda _: None})
        monkeypatch.setattr(module, "os", quick)
    return two_steps(tmp_path / "saved")
