"""A file is replaced whole or not at all; one of lines holds whole ones."""

import errno
import os
from pathlib import Path

import pytest

from dsv3_jax.files import is_part, replace_file, whole_lines


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old")

    def fail(source: Path, target: Path) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_with_the_name_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        replace_file(tmp_path / "file", b"new")
    assert str(error.value) == f"[Errno 28] No space left on device: '{tmp_path / 'file'}'"
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_lines_holds_whole_ones_whatever_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def interrupted() -> None:
        with whole_lines(path) as write:
            write("one €\n")
            assert path.read_text() == "one €\n"
            write("two\n")
            with path.open("ab") as file:
                file.write(b"thr")  # as a disk that fills up leaves it
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "one €\ntwo\n"


def test_a_file_without_a_line_goes_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), whole_lines(tmp_path / "file"):
        raise ValueError("no")
    assert list(tmp_path.iterdir()) == []


def test_lines_replace_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with whole_lines(path) as write:
        write("one\n")
    with pytest.raises(ValueError, match="holds something already; allowed: a new or an empty"):
        whole_lines(path).__enter__()
    assert path.read_text() == "one\n"
    with pytest.raises(OSError, match="No such file or directory: "):
        whole_lines(tmp_path / "gone" / "file").__enter__()


def test_a_full_disk_of_lines_is_told_with_the_name_of_the_file() -> None:
    with (
        whole_lines("/dev/full") as write,
        pytest.raises(OSError, match=r"No space left on device: '/dev/full'"),
    ):
        write("one\n")


def test_parts_are_known_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.extend(tmp_path.iterdir()))
    replace_file(tmp_path / "a.json", b"")
    assert [is_part(path) for path in seen] == [True]
    for name in ("a.json", ".part", "a.part", f"x.a.{'0' * 32}.part", ".a.0123.part"):
        assert not is_part(tmp_path / name)
