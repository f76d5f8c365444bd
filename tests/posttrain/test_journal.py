"""The journal: every line at once, a torn end cut off wherever it tears, one process at a time."""

import json
import os
from pathlib import Path

import pytest

from dsv3_jax.files import held
from dsv3_jax.posttrain import journal
from dsv3_jax.posttrain.journal import Journal, Key

TAKEN = ValueError("another process is writing there")


def entry(number: int) -> dict:
    return {"id": "ä", "kind": "writing", "candidate": number, "text": "one\ntwo"}


def test_what_was_added_is_read_again(tmp_path: Path):
    path = tmp_path / "j"
    one = Journal(path)
    for number in (2, 0):
        one.add(entry(number))
        assert len(path.read_bytes().splitlines()) == len(one.entries)  # before it is closed
    one.close()
    two = Journal(path)
    assert two.entries == {Key("ä", "writing", n): entry(n) for n in (2, 0)}
    assert not two.torn
    two.close()


def test_an_end_that_is_torn_anywhere_loses_the_last_line_alone(tmp_path: Path):
    path = tmp_path / "j"
    for number in range(2):
        found = Journal(path)
        found.add(entry(number))
        found.close()
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        path.write_bytes(whole[:end])
        found = Journal(path)
        assert [*found.entries] == [Key("ä", "writing", 0)]
        assert found.torn == (end > first)
        found.add(entry(1))
        found.close()
        assert path.read_bytes() == whole


def test_lines_reach_the_disk_in_batches_and_at_the_end(tmp_path: Path, monkeypatch):
    synced, clock = [], [0.0]
    monkeypatch.setattr(journal.os, "fsync", lambda number: synced.append(number))
    monkeypatch.setattr(journal.time, "monotonic", lambda: clock[0])
    found = Journal(tmp_path / "j")
    for number in range(journal.LINES):
        assert not synced
        found.add(entry(number))
    assert len(synced) == 1
    found.add(entry(100))
    clock[0] += journal.SECONDS
    found.add(entry(101))
    assert len(synced) == 2
    found.add(entry(102))
    found.close()
    assert len(synced) == 3


@pytest.mark.parametrize("line", ["{", "[]", '{"id": "1"}', "1", json.dumps(entry(0))])
def test_a_line_that_is_none_of_ours_is_told(tmp_path: Path, line: str):
    path = tmp_path / "j"
    path.write_text(json.dumps(entry(0)) + "\n" + line + "\n")
    with pytest.raises(ValueError, match="j line 2 is no candidate"):
        Journal(path)


def test_a_full_disk_leaves_whole_lines(tmp_path: Path):
    path = tmp_path / "j"
    found = Journal(path)
    found.add(entry(0))
    before = path.read_bytes()
    real = found._file

    class Full:
        def write(self, data):
            if len(data) < 60:
                raise OSError(28, "No space left on device")
            return real.write(data[:20])

        def __getattr__(self, name):
            return getattr(real, name)

    found._file = Full()
    with pytest.raises(OSError, match=r"No space left on device: '.*/j'"):
        found.add(entry(1))
    assert path.read_bytes() == before
    assert len(found.entries) == 1
    found.close()


def test_a_folder_is_one_process_s(tmp_path: Path):
    with (
        held(tmp_path, TAKEN),
        pytest.raises(ValueError, match="another process is writing"),
        held(tmp_path, TAKEN),
    ):
        raise AssertionError("two hold it")
    with held(tmp_path, TAKEN):
        assert os.listdir(tmp_path) == []
