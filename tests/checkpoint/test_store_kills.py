"""Saving, replacing and deleting, stopped at every place where they change the disk (see
`tests/kills.py`); Orbax itself is stopped in the tests that are named after it and in those with
SIGKILL.
"""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3_jax import files
from dsv3_jax.checkpoint import store
from dsv3_jax.checkpoint.arrays import OrbaxError
from dsv3_jax.checkpoint.store import CheckpointError
from tests.kills import load, save, sweep, two_steps

STEP_2 = "step_00000002"


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# --- kills ---------------------------------------------------------------------------------------


def test_a_kill_while_saving_leaves_the_previous_or_the_new_one(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = sweep(saved, tmp_path, monkeypatch, lambda folder: save(folder, 3, version=2))
    found = [load(folder) for folder, _ in outcomes]
    # The marker is the one turning point: before it the old step, after it the new one.
    turn = found.index((3, 2))
    assert found == [(2, 1)] * turn + [(3, 2)] * (len(found) - turn)
    assert turn >= 10
    for folder, _ in outcomes:
        assert store.steps(folder)[:2] == [1, 2]


def test_a_kill_while_replacing_a_step_leaves_its_old_or_its_new_version(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = sweep(saved, tmp_path, monkeypatch, lambda folder: save(folder, 2, version=2))
    found = [load(folder) for folder, _ in outcomes]
    turn = found.index((2, 2))
    assert found == [(2, 1)] * turn + [(2, 2)] * (len(found) - turn)
    assert 10 <= turn < len(found) - 2  # also killed while the old version is being removed


def test_a_kill_while_deleting_leaves_a_whole_step_or_none(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = sweep(saved, tmp_path, monkeypatch, lambda folder: store.delete(folder, 2))
    found = [load(folder) for folder, _ in outcomes]
    assert found == [(2, 1)] + [(1, 1)] * (len(found) - 1)
    assert len(found) == 3  # marker, fsync, data


@pytest.mark.parametrize("step", [2, 3])
def test_after_any_kill_cleaning_and_saving_again_work(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    outcomes = sweep(saved, tmp_path, monkeypatch, lambda folder: save(folder, step, version=2))
    for i, (folder, _) in enumerate(outcomes):
        before = load(folder)
        if i % 2:  # saving must not need a clean folder
            store.clean(folder)
            assert load(folder) == before
            assert len(names(folder)) == len(store.steps(folder))
        save(folder, step, version=3)
        assert load(folder) == (step, 3)
        store.clean(folder)
        assert names(folder) == [f"step_{n:08d}" for n in range(1, step + 1)]


def test_killed_twice_while_replacing_still_leaves_a_whole_version(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = tmp_path / "once"
    first = sweep(saved, once, monkeypatch, lambda folder: save(folder, 2, version=2))
    moved = [folder for folder, _ in first if (folder / "step_00000002.old").exists()]
    assert len(moved) >= 4  # the old version stands aside
    for folder in moved[:: len(moved) // 3]:
        before = load(folder)
        twice = tmp_path / "twice" / folder.name
        second = sweep(folder, twice, monkeypatch, lambda f: save(f, 2, version=3))
        found = [load(again) for again, _ in second]
        turn = found.index((2, 3))
        assert found == [before] * turn + [(2, 3)] * (len(found) - turn)


def test_deleting_a_step_whose_replacement_was_killed_removes_both_versions(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, _ in sweep(saved, tmp_path, monkeypatch, lambda f: save(f, 2, version=2)):
        store.delete(folder, 2)
        assert store.steps(folder) == [1]
        assert load(folder) == (1, 1)


def test_a_kill_while_deleting_both_versions_brings_no_old_one_back(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced = sweep(saved, tmp_path / "a", monkeypatch, lambda f: save(f, 2, version=2))
    both = [
        folder
        for folder, _ in replaced
        if all((folder / name / store.MARKER).exists() for name in (STEP_2, f"{STEP_2}.old"))
    ]
    assert both
    outcomes = sweep(both[0], tmp_path / "b", monkeypatch, lambda f: store.delete(f, 2))
    found = [load(folder) for folder, _ in outcomes]
    turn = found.index((1, 1))
    assert found == [(2, 2)] * turn + [(1, 1)] * (len(found) - turn)
    assert turn > 1  # killed while the old one went, and after


# --- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [2, 3])
def test_a_full_disk_at_any_place_is_one_line_and_undoes_the_save(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    outcomes = sweep(saved, tmp_path, monkeypatch, lambda f: save(f, step, version=2), full)
    failed = [(folder, message) for folder, message in outcomes if message is not None]
    assert len(failed) >= 10
    for folder, message in failed:
        start = f"cannot write checkpoint of step {step} in {folder}: "
        assert message == f"{start}[Errno 28] No space left on device"
        assert names(folder) == ["step_00000001", "step_00000002"]
        assert load(folder) == (2, 1)
    # After the commit, all that can fail is the removal of the replaced version: tried again.
    succeeded = [folder for folder, message in outcomes if message is None]
    assert len(succeeded) == (3 if step == 2 else 0)  # its marker, fsync, data
    for folder in succeeded:
        assert names(folder) == ["step_00000001", "step_00000002"]
        assert load(folder) == (2, 2)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interrupt_leaves_nothing_behind(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: type[BaseException]
) -> None:
    folder = shutil.copytree(saved, tmp_path / "run")

    def interrupted(*_: Any) -> None:
        raise interrupt

    monkeypatch.setattr(store, "write_arrays", interrupted)
    with pytest.raises(interrupt):
        save(folder, 3, version=2)
    assert names(folder) == ["step_00000001", "step_00000002"]


def test_orbax_running_out_of_disk_undoes_the_save(tmp_path: Path) -> None:
    folder = two_steps(tmp_path / "run")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {"params": {f"w{i}": np.random.default_rng(i).random(4000) for i in range(20)}}
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step 3 in .*File too large") as error:
            store.save(folder, 3, large, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert names(folder) == ["step_00000001", "step_00000002"]
    assert load(folder) == (2, 1)


def test_a_full_disk_below_orbax_is_said_in_a_few_words(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What TensorStore says when a small file system is full."""

    def full(folder: Path, groups: Any) -> None:
        raise OrbaxError(
            'ValueError: RESOURCE_EXHAUSTED: Error writing "mu.head_DV/0.0" in OCDBT database at '
            f'local file "{folder}": Failed writing: "{folder}/d/0": Failed to write to file '
            "[OS error 28: ENOSPC No space left on device] [source locations='x.cc:1']"
        )

    monkeypatch.setattr(store, "write_arrays", full)
    with pytest.raises(CheckpointError) as error:
        save(saved, 3, version=2)
    assert str(error.value) == (
        f"cannot write checkpoint of step 3 in {saved}: No space left on device"
    )


# --- the order on disk ---------------------------------------------------------------------------


def test_all_data_is_durable_before_the_rename_and_the_marker_comes_last(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(saved, tmp_path / "run")
    events: list[tuple[str, Any]] = []

    def fsync(descriptor: int) -> None:
        events.append(("fsync", os.stat(descriptor).st_ino))
        os.fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        assert not (source / store.MARKER).exists()
        events.append(("rename", {p.stat().st_ino for p in (source, *source.rglob("*"))}))
        os.rename(source, target)

    def replace(source: Path, target: Path) -> None:
        events.append(("replace", source.stat().st_ino))
        os.replace(source, target)

    patched = {**vars(os), "fsync": fsync, "rename": rename, "replace": replace}
    for module in (store, files):
        monkeypatch.setattr(module, "os", types.SimpleNamespace(**patched))
    save(folder, 3, version=2)
    order = [kind for kind, _ in events]
    renamed, replaced = order.index("rename"), order.index("replace")
    assert events[renamed][1] <= {inode for _, inode in events[:renamed]}  # every file and folder
    between = [inode for _, inode in events[renamed + 1 : replaced]]
    assert between == [folder.stat().st_ino, events[replaced][1]]  # then the name, then the marker
    assert events[replaced + 1 :] == [("fsync", (folder / "step_00000003").stat().st_ino)]


WRITER = """
import sys, numpy as np
from pathlib import Path
from dsv3_jax.checkpoint import store
folder, first = Path(sys.argv[1]), int(sys.argv[2])
for i in range(first, 10**6):
    step = i // 2  # each step is written twice
    arrays = {g: {f"w{j}": np.full(3000, i + j, np.int32) for j in range(20)} for g in ("a", "b")}
    store.save(folder, step, arrays, {"i": i})
    for old in store.steps(folder)[:-2]:
        store.delete(folder, old)
    print(i, flush=True)
"""


@pytest.mark.slow
def test_sigkill_at_any_moment_loses_nothing_that_was_saved(tmp_path: Path) -> None:
    rng = random.Random(0)
    last = 0
    stale = 0
    for _ in range(12):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(last + 1)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            last = int(writer.stdout.readline())  # imports are over
            time.sleep(rng.uniform(0.0, 0.5))
            writer.send_signal(signal.SIGKILL)
            last = int((writer.stdout.read().split() or [last])[-1])
        reports: list[str] = []
        found = store.load(tmp_path, report=reports.append)
        assert reports == []
        assert found.meta["i"] in (last, last + 1)  # a commit may come just before its print
        for group in ("a", "b"):
            for j in range(20):
                assert (found.arrays[group][f"w{j}"] == found.meta["i"] + j).all()
        stale += len(store.clean(tmp_path))
        last = found.meta["i"]
    assert stale > 0  # some kills did hit a save
