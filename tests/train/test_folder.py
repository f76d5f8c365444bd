"""Run folders: numbers, and which one is resumed."""

import contextlib
import errno
import os
from pathlib import Path

import pytest

from dsv3_jax.config import OutputConfig
from dsv3_jax.train.folder import RunFolder, find_run, new_run


def name_of_new_run(cfg: OutputConfig) -> str:
    with new_run(cfg) as run:
        return run.path.name


def test_every_run_gets_the_next_number_after_its_name(tmp_path: Path):
    cfg = OutputConfig(folder=str(tmp_path / "deep" / "runs"), name="a-b")
    made = [name_of_new_run(cfg) for _ in range(3)]
    assert made == ["a-b-001", "a-b-002", "a-b-003"]


def test_other_names_and_gaps_do_not_confuse_the_count(tmp_path: Path):
    for name in ("tiny-007", "tiny-x", "tiny", "tiny-2-044", "other-099", "tiny-", "small-1000"):
        (tmp_path / name).mkdir()
    (tmp_path / "tiny-009").write_text("a file counts: its name is taken")
    names = {"tiny": "tiny-010", "tiny-2": "tiny-2-045", "new": "new-001", "small": "small-1001"}
    for name, expected in names.items():
        cfg = OutputConfig(folder=str(tmp_path), name=name)
        assert name_of_new_run(cfg) == expected


def test_two_runs_that_start_at_one_moment_get_two_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cfg = OutputConfig(folder=str(tmp_path), name="run")
    name_of_new_run(cfg)
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(()))  # listed before the first was made
    assert name_of_new_run(cfg) == "run-002"


def test_a_new_folder_with_which_something_fails_is_gone(tmp_path: Path):
    with contextlib.suppress(ZeroDivisionError), new_run(OutputConfig(str(tmp_path))) as run:
        (run.path / "inner").mkdir()
        run.path / str(1 // 0)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path, *args, **kwargs) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match=r"output.folder .*runs cannot be written to: No space left"):
        name_of_new_run(OutputConfig(folder=str(tmp_path / "runs")))


def run_at(path: Path, time: int) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    os.utime(path / "config.json", ns=(time, time))
    return path


def test_the_newest_run_is_the_one_started_or_resumed_last(tmp_path: Path):
    older, newer = run_at(tmp_path / "b-001", 10**18), run_at(tmp_path / "a-001", 10**18 + 1)
    assert find_run(tmp_path, "newest") == RunFolder(newer)
    os.utime(older / "config.json", ns=(10**18 + 2, 10**18 + 2))
    assert find_run(tmp_path, "newest") == RunFolder(older)


def test_a_run_that_was_never_saved_is_not_the_newest_while_another_was(tmp_path: Path):
    saved, _ = run_at(tmp_path / "a-001", 10**18), run_at(tmp_path / "a-002", 10**18 + 1)
    step = saved / "checkpoints" / "step_00000004"
    step.mkdir(parents=True)
    (step / "COMMITTED").touch()
    assert find_run(tmp_path, "newest") == RunFolder(saved)


def test_a_run_is_found_by_its_checkpoints_too(tmp_path: Path):
    run = run_at(tmp_path / "a-001", 10**18)
    (run / "checkpoints" / "step_00000004").mkdir(parents=True)
    for path in (run / "checkpoints", run / "checkpoints" / "step_00000004"):
        assert find_run(tmp_path, str(path)) == RunFolder(run)


def test_a_run_is_found_by_path_or_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    inside, outside = run_at(tmp_path / "runs" / "a-001", 1), run_at(tmp_path / "elsewhere", 2)
    monkeypatch.chdir(tmp_path)
    assert find_run(tmp_path / "runs", "a-001").path == inside
    assert find_run(tmp_path / "runs", str(outside)).path == outside
    assert find_run(tmp_path / "runs", "elsewhere").path == Path("elsewhere")


@pytest.mark.parametrize("wanted", ["newest", "none", "empty"])
def test_where_there_is_no_run_nothing_is_found(tmp_path: Path, wanted: str):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--resume.*no run"):
        find_run(tmp_path, wanted)
