"""A folder appears whole or not at all, wherever its writer is killed; only models are replaced."""

import contextlib
import itertools
import os
import shutil
import types
from pathlib import Path

import pytest

from dsv3_jax import files
from dsv3_jax.checkpoint import new_folder as module
from dsv3_jax.checkpoint.new_folder import new_folder


class Killed(BaseException):
    """Stands for SIGKILL: after it nothing reaches the disk."""


def write(path: Path, version: str) -> None:
    with new_folder(path, 100, overwrite=True) as folder:
        (folder / "config.json").write_text(version)
        (folder / "model.safetensors").write_text(version)


def content(path: Path) -> set[str]:
    return {file.read_text() for file in path.iterdir()}


def stop_at(patch: pytest.MonkeyPatch, at: int) -> list[str]:
    """Nothing happens on the disk from the change numbered `at` on. Returns what was reached."""
    reached: list[str] = []

    def watched(name: str, real):
        def act(*args, **kwargs):
            reached.append(name)
            if len(reached) > at:
                raise Killed
            return real(*args, **kwargs)

        return act

    names = ("rename", "fsync")
    patched = {name: watched(name, getattr(os, name)) for name in names}
    for patched_module in (module, files):
        patch.setattr(patched_module, "os", types.SimpleNamespace(**{**vars(os), **patched}))
    rmtree = watched("rmtree", shutil.rmtree)
    patched = {**vars(shutil), "rmtree": rmtree}
    patch.setattr(module, "shutil", types.SimpleNamespace(**patched))
    return reached


def test_wherever_a_writer_is_killed_the_old_or_the_new_model_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The next writer finds it, and clears away the rest."""
    seen = set()
    for at in itertools.count():
        path = tmp_path / str(at) / "model"
        write(path, "old")
        with monkeypatch.context() as patch:
            reached = stop_at(patch, at)
            try:
                write(path, "new")
            except Killed:
                pass
            else:
                assert len(reached) == at
                break
        if path.exists():
            seen |= content(path)
            assert content(path) in ({"old"}, {"new"})
        with contextlib.suppress(ZeroDivisionError), new_folder(path, 100, overwrite=True):
            # It failed, but only after it had cleared up.
            assert content(path) in ({"old"}, {"new"})
            assert len(list(path.parent.iterdir())) == 2  # the model, and what is being written
            str(1 // 0)
        assert [p.name for p in path.parent.iterdir()] == ["model"]
    assert seen == {"old", "new"}
    assert at > 5


@pytest.mark.parametrize("name", ["thesis.tex", "metrics.jsonl", "src"])
def test_a_folder_that_holds_more_than_a_model_is_never_replaced(tmp_path: Path, name: str):
    path = tmp_path / "model"
    write(path, "old")
    (path / name).mkdir()
    with pytest.raises(ValueError, match=rf"model holds {name}, which is no part of a model"):
        write(path, "new")
    assert (path / "config.json").read_text() == "old"


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "checkpoints/step_00000007", "model-00001-of-00002.safetensors"]
)
def test_folders_in_a_model_and_trained_steps_are_never_replaced(tmp_path: Path, name: str):
    path = tmp_path / "model"
    write(path, "old")
    (path / name).mkdir(parents=True)
    with pytest.raises(ValueError, match="which is no part of a model"):
        write(path, "new")
    assert (path / "config.json").read_text() == "old"


def test_what_a_neighbour_of_a_longer_name_is_writing_is_left_alone(tmp_path: Path):
    """Also one whose name holds what a pattern would read otherwise."""
    with new_folder(tmp_path / "m.v2", 100, overwrite=True) as neighbour:
        for name in ("m", "[m]*"):
            write(tmp_path / name, "old")
        assert neighbour.exists()
