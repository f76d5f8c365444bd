"""Saving beside the training: order, errors, what stays; stopped at every place on the disk."""

import errno
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.checkpoint import store
from dsv3_jax.checkpoint.retention import Retention
from dsv3_jax.checkpoint.saver import Saver
from dsv3_jax.checkpoint.store import CheckpointError
from tests.kills import arrays, load, sweep

ONE = Retention(last=1)


def start(saver: Saver, step: int, version: int = 2) -> None:
    saver.start(step, arrays(version), {"version": version})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def damage(folder: Path, step: int) -> None:
    (folder / f"step_{step:08d}" / "manifest.json").write_text("{}")


@pytest.fixture
def gate(saved: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Saves wait until this is called; whatever a test leaves waiting may end after it."""
    opened, write = threading.Semaphore(0), store.write_arrays

    def waiting(*args: object) -> None:
        assert opened.acquire(timeout=60)
        write(*args)

    monkeypatch.setattr(store, "write_arrays", waiting)
    yield opened.release
    opened.release(10)


def test_without_a_word_on_what_was_loaded_every_step_counts(saved: Path):
    saver = Saver(saved, Retention(last=2))
    start(saver, 3)
    saver.wait()
    assert (saver.steps(), store.steps(saved)) == ([2, 3], [2, 3])


def test_what_cannot_be_thinned_out_is_saved_all_the_same(
    saved: Path, monkeypatch: pytest.MonkeyPatch
):
    saver, steps = Saver(saved, ONE, loaded=2), store.steps

    def unreadable(folder: Path) -> list[int]:
        raise CheckpointError(f"cannot read {folder}")

    monkeypatch.setattr(store, "steps", unreadable)
    start(saver, 3)
    saver.wait()
    assert saver.committed == 3
    assert saver.undeleted == f"cannot read {saved}"
    monkeypatch.setattr(store, "steps", steps)
    assert saver.steps() == [1, 2, 3]


def test_a_save_runs_beside_its_caller_and_the_next_one_waits_for_it(
    saved: Path, gate: Callable[[], None]
):
    saver = Saver(saved, loaded=2)
    start(saver, 3)
    assert saver.busy
    assert (store.steps(saved), saver.committed) == ([1, 2], 2)
    second = threading.Thread(target=start, args=(saver, 4))
    second.start()
    second.join(0.05)
    assert second.is_alive()
    gate()
    second.join()
    assert (store.steps(saved), saver.committed) == ([1, 2, 3], 3)
    assert saver.busy
    gate()
    assert saver.steps() == [1, 2, 3, 4]  # who asks, waits
    assert not saver.busy
    assert load(saved) == (4, 2)


def test_nothing_of_the_arrays_stays_once_they_are_saved(saved: Path):
    array = np.zeros(3)
    saver = Saver(saved)
    saver.start(3, {"params": {"w": (last := array[:])}}, {})
    alive = weakref.ref(last)
    del last
    saver.wait()
    assert alive() is None


@pytest.mark.parametrize("again", [Saver.wait, lambda saver: start(saver, 4)], ids=["wait", "next"])
def test_an_error_is_raised_once_by_whoever_comes_next_and_says_what_stays(
    saved: Path, monkeypatch: pytest.MonkeyPatch, again: Callable[[Saver], None]
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    saver = Saver(saved, loaded=2)
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_arrays", full)
        start(saver, 3)
        with pytest.raises(CheckpointError) as error:
            again(saver)
    assert str(error.value) == (
        f"cannot write checkpoint of step 3 in {saved}: [Errno 28] No space left on device; "
        "the newest checkpoint is of step 2"
    )
    assert saver.committed == 2
    saver.wait()
    start(saver, 3)
    saver.wait()
    assert saver.committed == 3


def test_where_there_is_none_yet_it_says_so(tmp_path: Path):
    saver = Saver(tmp_path / "none")
    assert saver.newest() == "no checkpoint yet"
    saver.start(1, {}, {"x": float("nan")})
    with pytest.raises(CheckpointError, match=r"must be JSON: .*; no checkpoint yet$"):
        saver.wait()


def test_an_error_that_is_a_fault_of_ours_is_raised_as_it_is(
    saved: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(store, "write_arrays", None)
    saver = Saver(saved)
    start(saver, 3)
    with pytest.raises(TypeError):
        saver.wait()


# --- what stays ---


def test_after_each_save_the_last_ones_stay_and_those_of_every_some_steps(saved: Path):
    saver = Saver(saved, Retention(last=2, every=4, regular=1), loaded=2)
    left = {}
    for step in range(3, 11):
        start(saver, step)
        left[step] = saver.steps()
    assert left[3] == [2, 3]
    assert left[6] == [4, 5, 6]
    assert left[10] == [4, 8, 9, 10]
    assert names(saved) == [f"step_{step:08d}" for step in (4, 8, 9, 10)]


def test_a_damaged_checkpoint_is_none_of_those_that_stay(saved: Path):
    """Neither that of a step that comes again, nor one that nothing would ever replace."""
    start(saver := Saver(saved, loaded=2), 5)
    saver.wait()
    damage(saved, 5)
    saver = Saver(saved, ONE, loaded=2)
    assert (saver.steps(), saver.newest()) == ([1, 2], "the newest checkpoint is of step 2")
    start(saver, 3)
    assert saver.steps() == store.steps(saved) == [3]
    damage(saved, 3)
    saver.disown(3)
    start(saver, 3, version=4)
    assert saver.steps() == [3]
    assert load(saved) == (3, 4)


def test_where_all_stay_the_damaged_do_too(saved: Path):
    damage(saved, 2)
    start(saver := Saver(saved, loaded=1), 3)
    assert saver.steps() == [1, 3]
    assert store.steps(saved) == [1, 2, 3]


def test_what_cannot_be_deleted_is_said_and_tried_again(
    saved: Path, monkeypatch: pytest.MonkeyPatch
):
    def refused(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    saver = Saver(saved, ONE, loaded=2)
    with monkeypatch.context() as patch:
        patch.setattr(store, "_drop", refused)
        start(saver, 3)
        saver.wait()
    first = saved / "step_00000001"
    assert saver.undeleted == f"cannot delete checkpoint {first}: [Errno 13] Permission denied"
    assert store.steps(saved) == [1, 2, 3]
    start(saver, 4)
    assert saver.steps() == [4]


# --- kills and failures at every place ---


def test_a_kill_while_saving_and_thinning_out_leaves_the_previous_or_the_new_one(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def action(folder: Path) -> None:
        start(saver := Saver(folder, ONE, loaded=2), 3)
        saver.wait()

    outcomes = sweep(saved, tmp_path, monkeypatch, action)
    found = [load(folder) for folder, _ in outcomes]
    turn = found.index((3, 2))
    assert found == [(2, 1)] * turn + [(3, 2)] * (len(found) - turn)
    assert turn >= 10
    for i, (folder, _) in enumerate(outcomes):
        if i < turn:
            assert store.steps(folder) == [1, 2]  # nothing goes before its successor has come
        before = load(folder)
        store.clean(folder)
        assert load(folder) == before
        assert names(folder) == [f"step_{step:08d}" for step in store.steps(folder)]
        start(saver := Saver(folder, ONE, loaded=before[0]), 4, version=3)
        assert saver.steps() == [4]
    assert {len(store.steps(folder)) for folder, _ in outcomes} == {1}
    assert len(found) - turn >= 6  # marker, fsync, data of each of the two


@pytest.mark.parametrize("step", [2, 3])
def test_a_kill_beside_a_damaged_newest_one_leaves_the_one_that_was_gone_on_from(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
):
    damage(saved, 2)

    def action(folder: Path) -> None:
        start(saver := Saver(folder, ONE, loaded=1), step)
        saver.wait()

    outcomes = sweep(saved, tmp_path, monkeypatch, action)
    ignored: list[str] = []
    found = [store.load(folder, report=ignored.append).step for folder, _ in outcomes]
    turn = found.index(step)
    assert found == [1] * turn + [step] * (len(found) - turn)
    assert 10 <= turn < len(found)


def test_a_full_disk_at_any_place_is_said_and_a_whole_checkpoint_stays(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    told: list[str] = []

    def action(folder: Path) -> None:
        saver = Saver(folder, ONE, loaded=2)
        start(saver, 3)
        try:
            saver.wait()
        finally:
            told.append(saver.undeleted)

    full = OSError(errno.ENOSPC, "No space left on device")
    outcomes = sweep(saved, tmp_path, monkeypatch, action, full)
    for (folder, message), undeleted in zip(outcomes, told, strict=False):
        reason = f"in {folder}: [Errno 28] No space left on device; the newest checkpoint is of"
        if message is not None:
            assert message == f"cannot write checkpoint of step 3 {reason} step 2"
            assert (names(folder), undeleted) == (["step_00000001", "step_00000002"], "")
            assert load(folder) == (2, 1)
        else:
            assert undeleted.startswith(f"cannot delete checkpoint {folder}")
            assert undeleted.endswith("No space left on device")
            assert load(folder) == (3, 2)
    kinds = [kind for kind, _ in itertools.groupby(message is None for _, message in outcomes)]
    assert kinds == [False, True]
