"""Each line of a JSONL file is a document with its own name; whatever is wrong names the line."""

import codecs
import gzip
from pathlib import Path

import pytest

from dsv3_jax.data.documents import Document
from dsv3_jax.data.jsonl import read_jsonl


def read(path: Path, field: str = "text", bad_utf8: str = "reject") -> list[Document]:
    return list(read_jsonl(path, "a.jsonl", field, bad_utf8))


def refusal(path: Path, field: str = "text") -> str:
    with pytest.raises(ValueError, match=r"^data\.source: ") as error:
        read(path, field)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.jsonl"


def test_every_line_is_a_document_and_blank_lines_are_none(path: Path) -> None:
    path.write_bytes(
        b'{"text": "a\\nb"}\r\n\n  \n{"id": 7, "text": "\xc3\xa9\\u00e9\\ud83d\\ude00"}'
    )
    assert read(path) == [Document("a.jsonl:1", "a\nb"), Document("a.jsonl:4", "éé😀")]


def test_a_byte_order_mark_is_no_part_of_the_first_line(path: Path) -> None:
    path.write_bytes(codecs.BOM_UTF8 + b'{"text": "a"}\n{"text": "\xff"}\n')
    assert next(read_jsonl(path, "a.jsonl", "text", "reject")) == Document("a.jsonl:1", "a")
    assert "line 2 is not utf-8 text: byte 0xff at offset 27" in refusal(path)


def test_the_text_may_be_in_any_field(path: Path) -> None:
    path.write_text('{"text": "no", "content": "yes"}\n')
    assert read(path, "content") == [Document("a.jsonl:1", "yes")]


def test_compressed_lines_are_the_same_documents(path: Path) -> None:
    lines = b'{"text": "one"}\n{"text": "two"}\n'
    path.write_bytes(lines)
    packed = path.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(lines))
    assert read(packed) == read(path)
    packed.write_bytes(gzip.compress(lines)[:-9])
    assert f"cannot read {packed}: " in refusal(packed)
    packed.write_bytes(lines)
    assert f"cannot read {packed}: Not a gzipped file" in refusal(packed)


def test_lines_are_read_as_they_are_asked_for(path: Path) -> None:
    path.write_text('{"text": "one"}\nbroken\n')
    documents = read_jsonl(path, "a.jsonl", "text", "reject")
    assert next(documents).text == "one"
    with pytest.raises(ValueError, match="line 2 is no JSON"):
        next(documents)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "a"', "line 2 is no JSON: Expecting ',' delimiter at column 13"),
        ("[" * 100_000, "line 2 is no JSON that can be read: maximum recursion depth"),
        ('{"text": "a", "n": ' + "1" * 5000 + "}", "line 2 is no JSON that can be read: Exceeds"),
        ('"text"', "line 2 is a JSON str; allowed: an object with the field 'text'"),
        ('{"b": 1, "a": 2}', "line 2 has no field 'text'; fields found: 'a', 'b'; allowed"),
        ("{}", "line 2 has no field 'text'; fields found: none"),
        ('{"text": null}', "line 2: field 'text' is of type NoneType; allowed: text"),
        ('{"text": ["a"]}', "line 2: field 'text' is of type list"),
    ],
)
def test_a_line_without_its_text_is_refused(path: Path, line: str, expected: str) -> None:
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    assert f"{path} {expected}" in refusal(path)


@pytest.mark.parametrize(
    ("line", "expected", "replaced"),
    [
        (b'{"text": "ab\xe9c"}', "line 2 is not utf-8 text: byte 0xe9 at offset 29", "ab\ufffdc"),
        (b'{"text": "ab\\ud800c"}', "line 2, field 'text' is not utf-8 text: byte 0xed", None),
    ],
)
def test_bad_utf8_is_refused_with_its_place_or_replaced(
    path: Path, line: bytes, expected: str, replaced: str | None
) -> None:
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    assert f"{path} {expected}" in refusal(path)
    text = read(path, bad_utf8="replace")[1].text
    assert text == (replaced or "ab\ufffd\ufffd\ufffdc")
    text.encode()


def test_a_missing_file_is_refused(path: Path) -> None:
    assert f"cannot read {path}: No such file" in refusal(path)
