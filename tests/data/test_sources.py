"""Documents are the files asked for; the split depends on texts alone; bad input is one line."""

import sysconfig
from pathlib import Path

import pytest

from dsv3_jax.data.sources import Document, content_hash, load_documents, split_documents


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


def documents_of(*texts: str) -> list[Document]:
    return [Document(f"document {i}", text) for i, text in enumerate(texts)]


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


# --- split ---


def test_each_document_is_on_one_side_and_the_fraction_holds() -> None:
    documents = documents_of(*(f"text {i}" for i in range(2000)))
    train, validation = split_documents(documents, 0.3)
    assert sorted(train + validation, key=documents.index) == documents
    assert abs(len(validation) / len(documents) - 0.3) < 0.05


def test_side_of_a_document_depends_on_its_text_alone() -> None:
    documents = documents_of(*(f"text {i}" for i in range(100)))
    held_out = {document.text for document in split_documents(documents, 0.3)[1]}
    renamed = [Document(f"copy of {d.name}", d.text) for d in reversed(documents)]
    more = renamed + documents + documents_of(*(f"new {i}" for i in range(50)))
    train, validation = split_documents(more, 0.3)
    known = {document.text for document in documents}
    assert {document.text for document in validation} & known == held_out
    assert {document.text for document in train} & known == known - held_out


def test_split_is_the_same_on_every_machine() -> None:
    documents = documents_of(*(f"text {i}" for i in range(20)))
    _, validation = split_documents(documents, 0.3)
    numbers = [int(document.text.removeprefix("text ")) for document in validation]
    assert numbers == [6, 7, 11, 12, 13, 14, 17, 19]


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5, 0.98])
def test_a_single_document_is_cut_at_a_line(fraction: float) -> None:
    text = "".join(f"line {i} of a book\r\n" for i in range(1000))
    (train,), (validation,) = split_documents([Document("book", text)], fraction)
    assert train.text + validation.text == text
    assert train.text.endswith("\n")
    assert abs(len(validation.text) / len(text) - fraction) < 0.001
    cut = len(train.text)
    assert (train.name, validation.name) == (f"book[:{cut}]", f"book[{cut}:]")


@pytest.mark.parametrize("text", ["title\n" + "x" * 994, "x" * 1000])
def test_a_text_of_one_long_line_is_cut_inside_it(text: str) -> None:
    (train,), (validation,) = split_documents([Document("a", text)], 0.1)
    assert (train.text, validation.text) == (text[:900], text[900:])


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_few_documents_never_leave_a_side_empty(fraction: float) -> None:
    documents = documents_of("short\n", "the longest\nof\nall\n", "middle\n")
    train, validation = split_documents(documents, fraction)
    large, small = (train, validation) if fraction < 0.5 else (validation, train)
    assert "".join(document.text for document in small)
    assert len(small) == 1
    whole = [document for document in large if document in documents]
    assert whole == [documents[0], documents[2]]
    (part,) = (document for document in large if document not in documents)
    pieces = (part, small[0]) if fraction < 0.5 else (small[0], part)
    assert "".join(document.text for document in pieces) == documents[1].text


@pytest.mark.parametrize("documents", [[], documents_of("x"), documents_of("", "x")])
def test_nothing_to_divide_is_refused(documents: list[Document]) -> None:
    with pytest.raises(ValueError, match=f"in {len(documents)} documents") as error:
        split_documents(documents, 1e-9)
    assert "data.source" in one_line(error)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_impossible_fraction_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"validation_fraction is {fraction}; allowed"):
        split_documents(documents_of("a\n", "b\n"), fraction)
