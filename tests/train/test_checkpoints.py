"""A run's checkpoints while it trains: what is told of failures, and what a run goes back to."""

import errno
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.checkpoint import store
from dsv3_jax.checkpoint.arrays import CheckpointError
from dsv3_jax.config import DataConfig, OutputConfig, RunConfig
from dsv3_jax.train import checkpoints
from dsv3_jax.train.checkpoints import Checkpoints
from dsv3_jax.train.folder import RunFolder
from dsv3_jax.train.snapshot import Position, Snapshot
from tests.shapes import TINY

CFG = RunConfig(model=TINY, data=DataConfig(length=16), output=OutputConfig(save_every=10))


class Told:
    """In place of `Output`."""

    def __init__(self) -> None:
        self.events: list[tuple[int, str, str]] = []
        self.messages: list[str] = []

    def event(self, record: dict[str, Any]) -> None:
        self.events.append((record["step"], record["event"], record["text"]))

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Steps 10, 20 and 25 of a run, without arrays."""
    monkeypatch.setattr(checkpoints, "contents", lambda cfg, snapshot, data: ({}, {}))
    for step in (10, 20, 25):
        store.save(tmp_path / "checkpoints", step, {}, {})
    return tmp_path / "checkpoints"


def going_on(folder: Path, step: int, **output: int) -> Checkpoints:
    cfg = replace(CFG, output=replace(CFG.output, **output))
    return Checkpoints(cfg, RunFolder(folder.parent), {}, Position(step))


def at(step: int) -> Snapshot:
    return Snapshot(None, Position(step, consumed_rows=step))


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failed_save_is_told_with_its_own_step_at_the_first_look_after_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    out, full = Told(), threading.Event()

    def waits_then_fails(*_: object) -> None:
        assert full.wait(60)
        no_room()

    monkeypatch.setattr(store, "write_arrays", waits_then_fails)
    run = going_on(folder, 25)
    run.hand_over(at(30), out)
    run.look(out)
    assert out.events == []  # still in flight, and nobody waited
    full.set()
    while run._saver.busy:
        pass
    run.look(out)
    run.look(out)
    said = f"cannot write checkpoint of step 30 in {folder}: [Errno 28] No space left on device"
    rest = "; the newest checkpoint is of step 25; training goes on"
    assert out.events == [(30, "not saved", said + rest)]


def test_the_last_save_is_an_error_and_the_one_before_it_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    out, run = Told(), going_on(folder, 25)
    monkeypatch.setattr(store, "write_arrays", no_room)
    run.hand_over(at(30), out)
    with pytest.raises(
        CheckpointError, match=r"step 31 in .*; the newest checkpoint is of step 25"
    ):
        run.finish(at(31), out)
    assert [event[:2] for event in out.events] == [(30, "not saved")]


def test_a_state_that_is_being_saved_is_not_saved_again_at_the_end_unless_that_failed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    out, run = Told(), going_on(folder, 25)
    write, wrote = store.write_arrays, []
    monkeypatch.setattr(store, "write_arrays", lambda *args: wrote.append(1) or write(*args))
    run.hand_over(at(30), out)
    run.finish(at(30), out)
    assert (len(wrote), store.steps(folder)[-1]) == (1, 30)
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_arrays", lambda *_: wrote.append(1) or no_room())
        run.hand_over(at(40), out)
        with pytest.raises(CheckpointError, match="of step 30"):
            run.finish(at(40), out)
    run.finish(at(40), out)
    assert (len(wrote), store.steps(folder)[-1]) == (4, 40)


def test_a_checkpoint_that_cannot_be_deleted_is_told_and_no_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    def refused(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    out, run = Told(), going_on(folder, 25, keep_last=2)
    with monkeypatch.context() as patch:
        patch.setattr(store, "_drop", refused)
        run.hand_over(at(30), out)
        run.finish(at(30), out)
    ((step, event, text),) = out.events
    assert (step, event) == (30, "not deleted")
    assert text == (
        f"cannot delete checkpoint {folder / 'step_00000010'}: [Errno 13] Permission denied"
    )
    assert store.steps(folder) == [10, 20, 25, 30]


def test_a_run_goes_back_to_the_newest_regular_checkpoint_that_can_be_read(folder: Path):
    out, run = Told(), going_on(folder, 25)
    assert run.newest_regular(out).step == 20  # 25 was left by a signal
    run.hand_over(at(30), out)
    assert run.newest_regular(out).step == 30  # waits for it
    for step in (30, 20):
        (folder / f"step_{step:08d}" / "meta.json").write_text("{} ")
    assert run.newest_regular(out).step == 10
    assert [message.split(": CRC")[0] for message in out.messages] == [
        f"checkpoint skipped: checkpoint {folder}/step_000000{step}" for step in (30, 20)
    ]
    assert run.newest() == "the newest checkpoint is of step 25"


def test_a_run_that_went_back_is_saved_again_where_it_was_saved_before(folder: Path):
    out, run = Told(), going_on(folder, 25)
    marker = folder / "step_00000025" / store.MARKER
    before = marker.stat().st_ino
    run.finish(at(25), out)
    assert marker.stat().st_ino == before
    run.newest_regular(out)
    run.finish(at(25), out)
    assert marker.stat().st_ino != before


def test_a_run_that_was_resumed_before_damaged_checkpoints_does_not_go_back_to_them(folder: Path):
    out, run = Told(), going_on(folder, 10)
    assert run.newest_regular(out).step == 10
    assert (run.newest(), out.messages) == ("the newest checkpoint is of step 10", [])


def test_without_a_regular_checkpoint_there_is_nowhere_to_go_back_to(folder: Path):
    assert going_on(folder, 25, save_every=50).newest_regular(Told()) is None
