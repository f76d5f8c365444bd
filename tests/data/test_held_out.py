"""The side of a document depends on its text alone; neither side is ever empty."""

import pytest

from dsv3_jax.data.documents import Document, content_hash
from dsv3_jax.data.held_out import survey
from tests.data.corpora import split_documents


def documents_of(*texts: str) -> list[Document]:
    return [Document(f"document {i}", text) for i, text in enumerate(texts)]


def one_line(error: pytest.ExceptionInfo[ValueError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


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


# --- without all documents in memory ---


@pytest.mark.parametrize("number", [1, 3, 200])
def test_a_survey_of_a_stream_divides_it_as_the_list(number: int) -> None:
    documents = documents_of(*(f"text {i}\nof {i * i} lines\n" for i in range(number)))
    found = survey(iter(documents), 0.1)
    divided = list(found.divide(iter(documents)))
    train = [document for document, held_out in divided if not held_out]
    validation = [document for document, held_out in divided if held_out]
    assert (train, validation) == split_documents(documents, 0.1)
    assert found.documents == number
    assert found.bytes == sum(len(document.text.encode()) for document in documents)
    assert found.content_hash == content_hash(documents)
    texts = "".join(document.text for document, _ in divided)
    assert texts == "".join(document.text for document in documents)
