"""Conversations come as they were written; what is none is told with file, line and field."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.data.conversations import read_conversations

ASK, SAY = {"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}
SYSTEM = {"role": "system", "content": "Be brief."}


def lines_to(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_messages_come_in_order_whatever_else_a_line_holds(tmp_path: Path):
    lines_to(tmp_path / "b.jsonl", {"messages": [SYSTEM, ASK, SAY, ASK, SAY]})
    verdict = {"by": "human", "verdict": "rejected", "note": ""}
    more = {"kind": "writing", "provenance": {"model": None}, "verification": verdict}
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("\n" + json.dumps({"messages": [ASK, SAY]} | more) + "\n")
    found = list(read_conversations(str(tmp_path / "*.jsonl*")))
    assert [one.messages for one in found] == [(ASK, SAY), (SYSTEM, ASK, SAY, ASK, SAY)]
    assert [one.rejected for one in found] == [True, False]
    assert [one.name.rpartition("/")[2] for one in found] == ["a.jsonl.gz:2", "b.jsonl:1"]


def test_a_file_that_two_globs_find_comes_once(tmp_path: Path):
    file = lines_to(tmp_path / "a.jsonl", {"messages": [ASK, SAY]})
    assert len(list(read_conversations((str(file), str(tmp_path / "*.jsonl"))))) == 1


def with_content(content: Any, role: Any = "user") -> dict:
    return {"messages": [{"role": role, "content": content}, SAY]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"is no JSON: Expecting property name"),
        ('{"messages": [], "messages": []}', r"messages stands there twice"),
        ("[1]", r"messages is \[1\]; allowed: an object with a list of messages"),
        ({"text": "x"}, r"messages is 'missing'; allowed: an object"),
        ({"messages": "x"}, r"messages is 'x'; allowed"),
        ({"messages": []}, r"messages holds no answer; allowed: one of role 'assistant'"),
        ({"messages": [ASK]}, r"messages holds no answer"),
        ({"messages": [ASK, SAY, ASK]}, r"messages\[2\]\.role is 'user'; allowed: the last mess"),
        ({"messages": [ASK, 7]}, r"messages\[1\] is 7; allowed: an object with role and content"),
        (with_content(None), r"messages\[0\]\.content is None; allowed: text"),
        ({"messages": [{"role": "user"}, SAY]}, r"messages\[0\]\.content is missing; allowed"),
        ({"messages": [{"content": "x"}, SAY]}, r"messages\[0\]\.role is missing; allowed: text"),
        (with_content("x", "tool"), r"messages\[0\]\.role is 'tool'; allowed: 'system', 'user', "),
        ({"messages": [ASK, SAY | {"weight": 0}]}, r"messages\[1\] has a field 'weight'; allowed"),
        ({"messages": [ASK, SAY | {"content": " \n"}]}, r"messages\[1\]\.content is an answer wit"),
        (with_content("\ud800"), r"messages\[0\]\.content is not utf-8 text"),
    ],
)
def test_a_fault_is_told_with_file_line_and_field(tmp_path: Path, line: Any, message: str):
    file = lines_to(tmp_path / "a.jsonl", {"messages": [ASK, SAY]}, {})
    text = line if isinstance(line, str) else json.dumps(line)
    file.write_text(file.read_text().replace("{}\n", f"\n{text}\n"))
    with pytest.raises(ValueError, match=rf"^data\.source: .*a\.jsonl line 3[:, ].*{message}"):
        list(read_conversations(str(file)))


def test_a_file_of_several_spellings_comes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = lines_to(tmp_path / "a.jsonl", {"messages": [ASK, SAY]})
    monkeypatch.chdir(tmp_path)
    (found,) = read_conversations((str(file), "a.jsonl"))
    assert found.name == f"{file}:1"


def test_files_that_hold_no_conversations_are_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    os.mkfifo(tmp_path / "pipe.jsonl")  # to read it would be to wait for who writes to it
    for source, message in (
        (str(tmp_path), r"is a folder; allowed with data\.format messages: .*/\*\*/\*\.jsonl'$"),
        (str(tmp_path / "pipe.jsonl"), r"cannot read .*pipe\.jsonl: not a plain file"),
        ("stdlib", "is stdlib; allowed with data.format messages"),
        (str(tmp_path / "a.txt"), r"a\.txt; allowed with data\.format messages: \.jsonl"),
        (str(tmp_path / "b.jsonl"), "no file matches"),
    ):
        with pytest.raises(ValueError, match=message):
            list(read_conversations(source))
