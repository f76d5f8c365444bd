"""Documents are the files asked for, read one by one; bad input is one line."""

import gzip
import os
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsv3_jax.data.documents import Document, content_hash
from dsv3_jax.data.sources import iterate_documents, load_documents


def fake_stdlib(folder: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(folder)})


def one_line(error: pytest.ExceptionInfo[ValueError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# --- the standard library ---


def test_stdlib_is_the_running_interpreters_source() -> None:
    documents = load_documents("stdlib")
    by_name = {document.name: document.text for document in documents}
    assert len(by_name) == len(documents) > 400
    assert list(by_name) == sorted(by_name)
    assert 5e6 < sum(len(text.encode()) for text in by_name.values()) < 30e6
    folder = Path(sysconfig.get_paths()["stdlib"])
    assert by_name["json/decoder.py"].encode() == (folder / "json/decoder.py").read_bytes()
    assert content_hash(documents) == content_hash(load_documents("stdlib"))


def test_stdlib_leaves_out_tests_packages_and_build_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_out = (
        "test/a.py",
        "json/tests/a.py",
        "idlelib/a.py",
        "x/idle_test/a.py",
        "site-packages/p/a.py",
        "dist-packages/a.py",
        "__pycache__/a.py",
        "config-3.99-somewhere/a.py",
        "_sysconfigdata__somewhere.py",
        "lib.so",
        "empty.py",
    )
    kept = ("z.py", "json/decoder.py", "testing.py")
    texts = dict.fromkeys(left_out + kept, b"1") | {"empty.py": b""}
    fake_stdlib(tmp_path, monkeypatch, texts)
    assert [document.name for document in load_documents("stdlib")] == sorted(kept)


def test_stdlib_files_are_read_in_their_declared_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "# coding: latin-1\nname = 'é'\r\n"
    fake_stdlib(tmp_path, monkeypatch, {"a.py": text.encode("latin-1")})
    assert load_documents("stdlib") == [Document("a.py", text)]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a.py": b"# coding: nonsense\n"}, "a.py: unknown encoding"),
        ({"a.py": b"x = 1\n" * 3 + b"\xff"}, "a.py is not utf-8 text: byte 0xff at offset 18"),
        ({"a.txt": b"x"}, "no Python source in"),
    ],
)
def test_broken_stdlib_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, bytes],
    expected: str,
) -> None:
    fake_stdlib(tmp_path, monkeypatch, files)
    with pytest.raises(ValueError, match=r"data\.source") as error:
        load_documents("stdlib")
    assert expected in one_line(error)


# --- the user's files ---


def test_globs_give_each_file_once_sorted_and_untouched(tmp_path: Path) -> None:
    texts = {"b.txt": "b\r\n\x00\ufeff", "a/deep/er.txt": "你好", "a/x[1].txt": "x", "none.txt": ""}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "folder.txt").mkdir()
    patterns = (f"{tmp_path}/**/*.txt", f"{tmp_path}/b.txt", f"{tmp_path}/a/x[1].txt")
    documents = load_documents(patterns)
    expected = [name for name in sorted(texts) if texts[name]]
    assert documents == [Document(f"{tmp_path}/{name}", texts[name]) for name in expected]


def test_a_file_of_several_spellings_comes_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "a.txt").write_text("a")
    (here / "link.txt").symlink_to("a.txt")
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.chdir(here)
    spellings = ("a.txt", f"{here}/a.txt", "~/a.txt", "../*/a.txt", "link.txt")
    names = ("a.txt", f"{here}/a.txt", f"{here}/a.txt", "../here/a.txt", "link.txt")
    for last, name in zip(spellings, names, strict=True):
        assert load_documents((*spellings, last)) == [Document(name, "a")]
    assert load_documents("*.txt") == [Document("a.txt", "a")]


def test_stdlib_and_globs_combine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_stdlib(tmp_path / "lib", monkeypatch, {"a.py": b"library"})
    (tmp_path / "a.py").write_text("mine")
    monkeypatch.chdir(tmp_path)
    documents = load_documents(("stdlib", "a.py"))
    assert [document.text for document in documents] == ["library", "mine"]


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file matches") as error:
        load_documents(f"{tmp_path}/*.txt")
    assert f"{tmp_path}/*.txt" in one_line(error)


def test_a_folder_is_refused_with_the_glob_to_use(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder") as error:
        load_documents(str(tmp_path))
    assert f"{tmp_path}/**/*.txt" in one_line(error)


def test_a_dangling_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="cannot read") as error:
        load_documents(f"{tmp_path}/*.txt")
    assert f"{tmp_path}/a.txt: No such file" in one_line(error)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_pipe_is_refused(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)  # to read it would be to wait for who writes to it
    with pytest.raises(ValueError, match=rf"cannot read .*{name}: not a plain file") as error:
        load_documents(f"{tmp_path}/*")
    one_line(error)


def test_a_forbidden_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("secret")

    def refuse(path: Path) -> bytes:  # permission bits do not stop an administrator
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match="cannot read") as error:
        load_documents(f"{tmp_path}/a.txt")
    assert f"{tmp_path}/a.txt: Permission denied" in one_line(error)


def test_wrong_utf8_is_refused_with_file_and_offset(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("é".encode() + b"ab\xe9c")
    with pytest.raises(ValueError, match="is not utf-8 text") as error:
        load_documents(f"{tmp_path}/a.txt")
    assert "a.txt" in one_line(error)
    assert "byte 0xe9 at offset 4" in one_line(error)


def test_files_without_text_are_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="no text in 2 files") as error:
        load_documents(f"{tmp_path}/*.txt")
    assert str(tmp_path) in one_line(error)


# --- files of many documents ---


def test_files_come_by_name_and_documents_in_the_order_of_their_file(tmp_path: Path) -> None:
    lines = [f'{{"text": "line {i}"}}' for i in range(1, 13)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines) + '\n{"text": ""}\n')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines[0].encode()))
    pq.write_table(pa.table({"text": ["row 1", "row 2"]}), tmp_path / "a.parquet")
    (tmp_path / "c.txt").write_text("text")
    documents = list(iterate_documents(f"{tmp_path}/*"))
    names = [document.name.removeprefix(f"{tmp_path}/") for document in documents]
    in_b = [f"b.jsonl:{i}" for i in range(1, 13)]
    assert names == ["a.parquet:1", "a.parquet:2", *in_b, "b.jsonl.gz:1", "c.txt"]
    assert [document.text for document in documents[2:14]] == [f"line {i}" for i in range(1, 13)]


def test_files_are_read_as_their_documents_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    read = []
    original = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or original(path))
    documents = iterate_documents(f"{tmp_path}/*.txt")
    assert next(documents).text == "a"
    assert read == ["a.txt"]


def test_the_field_and_bad_utf8_reach_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"body": "a\xff"}')
    pq.write_table(pa.table({"body": [b"b\xff"]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_bytes(b"c\xff")
    documents = load_documents(f"{tmp_path}/*", field="body", bad_utf8="replace")
    assert [document.text for document in documents] == ["a\ufffd", "b\ufffd", "c\ufffd"]
    for name in ("a.jsonl", "b.parquet", "c.txt"):
        with pytest.raises(ValueError, match="is not utf-8 text") as error:
            load_documents(f"{tmp_path}/{name}", field="body")
        assert "data.bad_utf8 'replace'" in one_line(error)
