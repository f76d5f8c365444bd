"""Parquet files: one of the columns is the text (report 4.1). Needs pyarrow, an extra."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3_jax.config.plain_json import check_plain
from dsv3_jax.data.documents import Document
from dsv3_jax.data.text_files import BadUtf8, decode, reason_of

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

# Rows in memory at a time; a row is a document.
_BATCH_ROWS = 256


def read_parquet(path: Path, name: str, field: str, bad_utf8: BadUtf8) -> Iterator[Document]:
    """A document for each row, named `file.parquet:17`, rows counted from 1 as lines are.

    ValueError without pyarrow, for a file that is no Parquet, has no such column of text or lacks a
    text; for bad UTF-8 (unless replaced) with row and offset in the row's text.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(
            f"data.source: reading {path} needs pyarrow: pip install 'dsv3_jax[parquet]'"
        ) from None
    number = 0
    try:
        check_plain(path)
        with pq.ParquetFile(path) as file:
            _check_column(path, file, field)
            for batch in file.iter_batches(_BATCH_ROWS, columns=[field]):
                for data in _bytes(batch.column(0)):
                    number += 1
                    if data is None:
                        raise ValueError(
                            f"data.source: {path} row {number}: column {field!r} is null; "
                            "allowed: text"
                        )
                    text = decode(f"{path} row {number}", data, bad_utf8)
                    yield Document(f"{name}:{number}", text)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"data.source: cannot read {path}: {reason_of(error)}") from None


def _check_column(path: Path, file: "pq.ParquetFile", field: str) -> None:
    import pyarrow as pa

    schema = file.schema_arrow
    if field not in schema.names:
        found = ", ".join(map(repr, sorted(schema.names))) or "none"
        raise ValueError(
            f"data.source: {path} has no column {field!r}; columns found: {found}; "
            "allowed as data.text_field: one of them"
        )
    if schema.names.count(field) > 1:
        raise ValueError(
            f"data.source: {path} has {schema.names.count(field)} columns {field!r}; allowed: one"
        )
    kind = schema.field(field).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    if not any(getattr(pa.types, f"is_{test}")(kind) for test in tests):
        raise ValueError(f"data.source: {path}: column {field!r} is of type {kind}; allowed: text")


def _bytes(column: "pa.Array") -> list[bytes | None]:
    """The column's values undecoded: what is declared as text need not be UTF-8."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_binary()).to_pylist()
