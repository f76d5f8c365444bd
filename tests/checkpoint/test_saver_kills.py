"""SIGKILL while Orbax saves a checkpoint in the background and older ones are deleted: at each
place where Python changes the disk, and at random moments, which meet TensorStore's writes too.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.checkpoint import store

# Imports take seconds, so one process forks the writers, before any library has made a thread.
NURSERY = """
import os, shutil, signal, sys
from pathlib import Path
import numpy as np
import orbax.checkpoint
from dsv3_jax.checkpoint.retention import Retention
from dsv3_jax.checkpoint.saver import Saver

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "fsync"}

def kill_at(place):
    '''Ends this process just before its change number `place` to the disk.'''
    count = -1
    def changing(event, args):
        nonlocal count
        reading = event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event in CHANGES and not reading:
            count += 1
            if count == place:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(changing)
    fsync = os.fsync
    os.fsync = lambda descriptor: (sys.audit("fsync"), fsync(descriptor))

def write(folder, first, last, retention):
    saver = Saver(folder, retention, loaded=first - 1 or None)
    for step in range(first, last):
        arrays = {g: {f"w{j}": np.full(3000, step + j, np.int32) for j in range(20)} for g in "ab"}
        saver.start(step, arrays, {})
    saver.wait()

for line in sys.stdin:
    folder, first, last, place = line.split()
    child = os.fork()
    if not child:
        if int(place) >= 0:
            kill_at(int(place))
        write(Path(folder), int(first), int(last), Retention(last=2, every=10))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """Starts writers of a folder, each in a process of its own."""

    def __init__(self, process: subprocess.Popen) -> None:
        self._process = process

    def start(self, folder: Path, first: int, last: int, place: int = -1) -> int:
        """A writer of steps `first` up to below `last`, killed at a place. Returns its process."""
        self._process.stdin.write(f"{folder} {first} {last} {place}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def ended(self) -> int:
        """How the writer ended."""
        return int(self._process.stdout.readline())


@contextmanager
def nursery() -> Iterator[Nursery]:
    command = [sys.executable, "-W", "ignore", "-c", NURSERY]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        yield Nursery(process)
        process.stdin.close()


def newest(folder: Path) -> int:
    """The step that is loaded, which must be whole, and be all there is but what may be there."""
    reports: list[str] = []
    found = store.load(folder, report=reports.append)
    assert reports == []
    for named in found.arrays.values():
        for j in range(20):
            np.testing.assert_array_equal(named[f"w{j}"], found.step + j)
    assert store.steps(folder)[-1] == found.step
    return found.step


def assert_only_whole_ones_left(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        f"step_{step:08d}" for step in store.steps(folder)
    ]


@pytest.mark.parametrize(
    "places",
    [
        pytest.param([30], marks=pytest.mark.slow),
        pytest.param(range(1000), marks=pytest.mark.exhaustive),
    ],
    ids=["one", "all"],
)
def test_sigkill_at_a_write_boundary_leaves_a_whole_checkpoint(tmp_path: Path, places: range):
    """Step 3 is written and step 1 deleted."""
    found = []
    with nursery() as writers:
        writers.start(tmp_path / "two", 1, 3)
        assert writers.ended() == 0
        for place in places:
            folder = Path(shutil.copytree(tmp_path / "two", tmp_path / f"at{place:03d}"))
            writers.start(folder, 3, 4, place)
            code = writers.ended()
            found.append(newest(folder))
            if code == 0:  # it has fewer places
                break
            assert code == -signal.SIGKILL
            before = store.steps(folder)
            store.clean(folder)
            assert store.steps(folder) == before
            assert_only_whole_ones_left(folder)
            if found[-1] == 2:
                assert before == [1, 2]
    turn = found.count(2)
    assert found == [2] * turn + [3] * (len(found) - turn)
    assert turn >= min(len(places), 30)
    if len(places) > 1:
        assert (code, len(found) - turn > 20) == (0, True)  # all places, and those of deleting


@pytest.mark.parametrize(
    "kills",
    [pytest.param(6, marks=pytest.mark.slow), pytest.param(60, marks=pytest.mark.exhaustive)],
)
def test_sigkill_at_any_moment_leaves_a_whole_checkpoint_and_the_run_goes_on(
    tmp_path: Path, kills: int
):
    moments, last, stale = random.Random(0), 0, 0
    with nursery() as writers:
        for _ in range(kills):
            writer = writers.start(tmp_path, last + 1, 10**6)
            while not any(step > last for step in store.steps(tmp_path)):
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.5))
            reached = store.steps(tmp_path)[-1]
            os.kill(writer, signal.SIGKILL)
            assert writers.ended() == -signal.SIGKILL
            last = newest(tmp_path)
            assert last >= reached
            stale += len(store.clean(tmp_path))
            assert_only_whole_ones_left(tmp_path)
            steps = set(store.steps(tmp_path))
            assert steps >= {step for step in range(1, last) if step % 10 == 0}
            assert len([step for step in steps if step % 10]) <= 4  # two, and those just let go
    assert stale > 0  # some kills did hit a save
