"""Each row of a Parquet file is a document; missing columns, texts and libraries are one line."""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsv3_jax.data import parquet
from dsv3_jax.data.documents import Document
from dsv3_jax.data.parquet import read_parquet


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.parquet"


def read(path: Path, field: str = "text", bad_utf8: str = "reject") -> list[Document]:
    return list(read_parquet(path, "a.parquet", field, bad_utf8))


def refusal(path: Path, field: str = "text") -> str:
    with pytest.raises(ValueError, match=r"^data\.source: ") as error:
        read(path, field)
    assert "\n" not in str(error.value)
    return str(error.value)


TEXTS = ["one", "", "drei\r\n", "four 你好"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary()])
def test_every_row_is_a_document(
    path: Path, kind: pa.DataType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "_BATCH_ROWS", 3)
    values = [text.encode() for text in TEXTS] if kind == pa.binary() else TEXTS
    pq.write_table(pa.table({"id": [1, 2, 3, 4], "body": pa.array(values, kind)}), path)
    expected = [Document(f"a.parquet:{i}", text) for i, text in enumerate(TEXTS, 1)]
    assert read(path, "body") == expected


def test_texts_in_a_dictionary_are_texts(path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array(TEXTS).dictionary_encode()}), path)
    assert [document.text for document in read(path)] == TEXTS


def test_a_column_that_is_missing_or_no_text_is_refused(path: Path) -> None:
    pq.write_table(pa.table({"b": ["x"], "a": [1]}), path)
    assert f"{path} has no column 'text'; columns found: 'a', 'b'; allowed" in refusal(path)
    assert f"{path}: column 'a' is of type int64; allowed: text" in refusal(path, "a")


def test_two_columns_of_the_name_are_refused(path: Path) -> None:
    columns = [pa.array(["a"]), pa.array(["b"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["text", "text"]), path)
    assert f"{path} has 2 columns 'text'; allowed: one" in refusal(path)


def test_a_row_without_text_is_refused(path: Path) -> None:
    pq.write_table(pa.table({"text": ["x", None]}), path)
    assert f"{path} row 2: column 'text' is null; allowed: text" in refusal(path)


def test_bad_utf8_is_refused_with_its_row_or_replaced(path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([b"fine", b"ab\xe9c"])}), path)
    assert f"{path} row 2 is not utf-8 text: byte 0xe9 at offset 2" in refusal(path)
    assert read(path, bad_utf8="replace")[1].text == "ab\ufffdc"


def test_a_file_that_is_no_parquet_is_refused(path: Path) -> None:
    assert f"cannot read {path}: " in refusal(path)
    path.write_bytes(b"PAR1 nothing of the kind PAR1")
    assert f"cannot read {path}: " in refusal(path)
    pq.write_table(pa.table({"text": TEXTS * 100}), path)
    path.write_bytes(path.read_bytes()[:-20])
    assert f"cannot read {path}: " in refusal(path)


def test_without_pyarrow_the_message_says_what_to_install(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "needs pyarrow: pip install 'dsv3_jax[parquet]'" in refusal(path)
