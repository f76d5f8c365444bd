"""A folder appears whole or not at all, wherever its writer is killed; only models are replaced."""

import contextlib
import itertools
import os
import shutil
import threading
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

    patch.setattr(module, "exchange", watched("exchange", module.exchange))
    names = ("rename", "fsync")
    patched = {name: watched(name, getattr(os, name)) for name in names}
    for patched_module in (module, files):
        patch.setattr(patched_module, "os", types.SimpleNamespace(**{**vars(os), **patched}))
    rmtree = watched("rmtree", shutil.rmtree)
    patched = {**vars(shutil), "rmtree": rmtree}
    patch.setattr(module, "shutil", types.SimpleNamespace(**patched))
    return reached


def swaps(folder: Path) -> bool:
    """Whether this file system can exchange names."""
    for name in ("a", "b"):
        (folder / name).mkdir()
    try:
        return files.exchange(folder / "a", folder / "b")
    finally:
        for name in ("a", "b"):
            (folder / name).rmdir()


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "one after the other"])
def test_wherever_a_writer_is_killed_the_old_or_the_new_model_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
):
    """The next writer finds it, and clears away the rest."""
    if not at_once:
        monkeypatch.setattr(module, "exchange", lambda one, other: False)
    elif not swaps(tmp_path):
        pytest.skip("a file system that does not exchange names")
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
        assert path.exists() or not at_once
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
    assert reached[reached.index("exchange") :] == (
        ["exchange", "fsync", "rmtree"]
        if at_once
        else ["exchange", "rename", "rename", "fsync", "rmtree", "rmtree"]
    )


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("kind", ["folder", "file", "checkpoint"])
def test_what_appears_under_the_name_meanwhile_is_kept(tmp_path: Path, kind: str, overwrite: bool):
    path = tmp_path / "model"
    theirs = {"folder": path / "thesis.tex", "file": path}.get(kind, path / "checkpoints/step_1/x")

    def writer() -> None:
        with new_folder(path, 100, overwrite) as folder:
            (folder / "config.json").touch()
            theirs.parent.mkdir(parents=True, exist_ok=True)
            theirs.write_text("theirs")
            if kind == "checkpoint":
                (path / "config.json").touch()

    with pytest.raises(ValueError, match=r"model (is a file|holds)"):
        writer()
    assert theirs.read_text() == "theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_old_model_takes_its_name_back_from_an_empty_folder(tmp_path: Path):
    """A kill left it beside its name, and somebody made a folder there."""
    path = tmp_path / "model"
    write(path, "old")
    path.rename(tmp_path / ".model.0123abcd.old")
    path.mkdir()
    with (
        pytest.raises(ValueError, match="holds a model already"),
        new_folder(path, 100, overwrite=False),
    ):
        pass
    assert content(path) == {"old"}


def test_of_two_writers_at_once_one_is_refused(tmp_path: Path):
    ended, both = [], threading.Barrier(2)

    def writer(name: str) -> None:
        both.wait()
        try:
            with new_folder(tmp_path / "model", 100, overwrite=False) as folder:
                (folder / "config.json").write_text(name)
            ended.append(name)
        except (ValueError, OSError) as error:
            ended.append(str(error))

    for _ in range(20):
        threads = [threading.Thread(target=writer, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = (end for end in ended if end in "ab")
        (refusal,) = (end for end in ended if end not in "ab")
        assert "holds a model already" in refusal or "another process is writing it" in refusal
        assert content(tmp_path / "model") == {winner}
        shutil.rmtree(tmp_path / "model")
        assert not list(tmp_path.iterdir())
        ended.clear()


def test_a_folder_that_somebody_holds_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "_TRIES", 2)
    with (
        module._held(tmp_path),
        pytest.raises(OSError, match="locked by another process; allowed: to wait"),
        new_folder(tmp_path / "model", 100, overwrite=False),
    ):
        pass


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


def test_what_is_written_on_after_an_interruption_is_removed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As TensorStore's threads do, which also make the folder anew."""
    real, left = shutil.rmtree, [1, 2, 3]

    def rmtree(folder: Path, **kwargs) -> None:
        real(folder, **kwargs)
        if left:
            (folder / "d").mkdir(parents=True)
            (folder / "d" / str(left.pop())).touch()

    patched = types.SimpleNamespace(**{**vars(shutil), "rmtree": rmtree})
    monkeypatch.setattr(module, "shutil", patched)

    def interrupted() -> None:
        with new_folder(tmp_path / "out", 0, overwrite=False):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not left
    assert not list(tmp_path.iterdir())
