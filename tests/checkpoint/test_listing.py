"""A reader beside a writer that keeps one checkpoint finds what is there, or says why not."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.checkpoint import listing, manifest, store
from dsv3_jax.checkpoint.store import CheckpointError
from tests.kills import load, read_npz, save


def go_on(folder: Path) -> None:
    """What a writer does that keeps one checkpoint."""
    (*_, newest) = store.steps(folder)
    save(folder, newest + 1, version=newest + 1)
    for step in store.steps(folder)[:-1]:
        store.delete(folder, step)


def again(folder: Path) -> None:
    """What a writer does that saves the newest step once more."""
    (*_, newest) = store.steps(folder)
    save(folder, newest, version=7)


def before(patch: pytest.MonkeyPatch, module: Any, name: str, act: Callable, times: int) -> None:
    """`act` happens before each of the first calls of a function."""
    real, left = getattr(module, name), [None] * times

    def call(*args: Any) -> Any:
        if left:
            left.pop()
            with patch.context() as inner:
                inner.setattr(module, name, real)
                act()
        return real(*args)

    patch.setattr(module, name, call)


@pytest.mark.parametrize(
    ("act", "step", "found"),
    [(go_on, None, (3, 3)), (again, None, (2, 7)), (again, 2, (2, 7))],
    ids=["next", "the same again", "the same, named"],
)
@pytest.mark.parametrize("module", ["arrays", "manifest", "list"])
def test_what_a_writer_replaces_meanwhile_is_no_damage(
    saved: Path, monkeypatch: pytest.MonkeyPatch, act: Callable, step: int | None, found, module
):
    """Before the arrays are read, before the manifest is, or while the steps are listed."""
    where = {"arrays": (store, "read_arrays"), "manifest": (manifest, "content")}
    place = where.get(module, (listing, "is_committed"))
    before(monkeypatch, *place, lambda: act(saved), times=1)
    assert load(saved, step) == found


def test_a_step_that_was_asked_for_and_went_is_told_with_those_there(saved: Path, monkeypatch):
    before(monkeypatch, store, "read_arrays", lambda: go_on(saved), times=1)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 2 .*: found steps \[3\]$"):
        load(saved, 2)


def test_a_reader_that_is_always_too_late_gives_up(saved: Path, monkeypatch: pytest.MonkeyPatch):
    before(monkeypatch, store, "read_arrays", lambda: go_on(saved), times=100)
    with pytest.raises(CheckpointError, match=r"replaced meanwhile, 5 times .*output\.keep_last"):
        load(saved)


def test_damage_beside_a_writer_is_told_once(saved: Path, monkeypatch: pytest.MonkeyPatch):
    (saved / "step_00000002" / "meta.json").write_text("{}")

    def lose_one() -> None:
        shutil.rmtree(saved / "step_00000001")
        save(saved, 1, version=5)

    reports: list[str] = []

    def read(folder: Path, described: Any) -> Any:
        if not reports[1:] and (saved / "step_00000001").exists():
            monkeypatch.setattr(store, "read_arrays", read_npz)
            lose_one()
            raise FileNotFoundError
        return read_npz(folder, described)

    monkeypatch.setattr(store, "read_arrays", read)
    assert store.load(saved, report=reports.append).meta == {"version": 5}
    (line,) = reports
    assert "step_00000002: CRC-32 of meta.json" in line


def test_what_is_described_is_what_would_be_read(saved: Path):
    reports: list[str] = []
    (saved / "step_00000002" / "manifest.json").write_text("[")
    step, groups = store.described(saved, report=reports.append)
    assert step == 1
    assert groups["params"]["w"]["shape"] == [2000]
    assert "step_00000002: CRC-32 of manifest.json" in reports[0]
