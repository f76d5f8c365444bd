"""Signals and broken pipes: what is said, what is saved, who hears a second signal."""

import io
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv3_jax.checkpoint import store
from dsv3_jax.checkpoint.arrays import CheckpointError
from dsv3_jax.cli import Stopped
from dsv3_jax.train import kind
from dsv3_jax.train.checkpoints import Checkpoints
from dsv3_jax.train.lockstep import Lockstep
from dsv3_jax.train.sharding import ONE_DEVICE
from tests.runs import SmallRun


class Pipe(io.StringIO):
    """Output whose reader leaves once it has read some words."""

    def __init__(self, last: str) -> None:
        super().__init__()
        self.last = last

    def write(self, text: str) -> int:
        if self.last in self.getvalue():
            raise BrokenPipeError
        return super().write(text)


def test_a_run_that_nobody_reads_any_more_stops_with_a_checkpoint(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As `train | tee log` at ^C, which ends tee first."""
    monkeypatch.setattr(sys, "stdout", Pipe(last="1/6 "))
    assert small.train("--config", small.config, "--output.folder", tmp_path) == 143
    (step,) = store.steps(tmp_path / "small-001" / "checkpoints")
    assert 1 < step < 6


def interrupted(*_: object) -> None:
    """In place of a run's end."""
    signal.raise_signal(signal.SIGTERM)
    raise AssertionError("nobody heard it")


def test_a_signal_while_a_run_is_finished_leaves_with_what_is_saved(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    with monkeypatch.context() as patch:
        patch.setattr(kind, "finish", interrupted)
        with pytest.raises(Stopped):
            small.train("--config", small.config, "--output.folder", tmp_path)
    run = tmp_path / "small-001"
    said = f"stopped: step 6 is saved, and --resume {run} finishes the run"
    assert said in capsys.readouterr().out
    assert store.steps(run / "checkpoints") == [4, 6]
    assert "Not finished" in (run / "report.html").read_text()
    assert small.train("--resume", run) == 0
    page = (run / "report.html").read_text()
    monkeypatch.setattr(kind, "finish", interrupted)
    with pytest.raises(Stopped):  # a finished run stays one
        small.train("--resume", run)
    assert (run / "report.html").read_text() == page


def no_room(*_: object) -> None:
    raise OSError("sample.txt: no room")


@pytest.mark.parametrize("finish", [interrupted, no_room])
def test_a_last_state_that_could_not_be_saved_is_told_however_a_run_ends(
    small: SmallRun,
    tmp_path: Path,
    finish: Callable,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    def unsaved(*_: object) -> None:
        raise CheckpointError("there is no room for step 3")

    monkeypatch.setattr(Checkpoints, "save", unsaved)
    monkeypatch.setattr(kind, "finish", finish)
    start = ("--config", small.config, "--output.folder", tmp_path, "--train.steps", 3)
    with pytest.raises((Stopped, SystemExit)):
        small.train(*start)
    shown = capsys.readouterr()
    assert "there is no room for step 3" in shown.out + shown.err
    assert "is saved" not in shown.out


def test_a_command_that_nobody_reads_from_the_start_trains_nothing(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdout", Pipe(last="data "))
    with pytest.raises(BrokenPipeError):
        small.train("--config", small.config, "--output.folder", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_first_signal_is_noted_and_a_second_one_acts_as_ever():
    heard, said = [], []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    # A process in the background of a script is born with ^C ignored.
    before_int = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        lockstep = Lockstep(ONE_DEVICE)
        with lockstep.hearing(said.append):
            assert lockstep.stopped_by is None
            signal.raise_signal(signal.SIGTERM)
            assert (lockstep.stopped_by, heard) == (signal.SIGTERM, [])
            assert said == ["SIGTERM: saving after this step; once more leaves without it"]
            signal.raise_signal(signal.SIGTERM)
            assert (lockstep.stopped_by, heard) == (signal.SIGTERM, [signal.SIGTERM])
            signal.raise_signal(signal.SIGINT)
            assert lockstep.stopped_by == signal.SIGTERM
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert len(said) == 2  # nobody listens any more
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, before_int)
