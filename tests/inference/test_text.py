"""A text that is shown as it comes: whole characters, nothing of a stop string, never late."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.inference.text import TextStream


def shown(pieces: list[bytes], *stops: str) -> list[str]:
    """What is shown after each token, and at the end."""
    stream, parts = TextStream(pieces, stops), []
    for token in range(len(pieces)):
        parts.append(stream.add(token))
        if stream.stopped:
            break
    return [*parts, stream.finish()]


def test_text_is_shown_at_once_where_nothing_is_open():
    assert shown([b"a", b"", b"bc "]) == ["a", "", "bc ", ""]


def test_a_character_is_shown_with_its_last_byte():
    euro, clef = "€".encode(), "𝄞".encode()
    assert shown([b"a" + euro[:1], euro[1:2], euro[2:] + b"b"]) == ["a", "", "€b", ""]
    assert shown([bytes([byte]) for byte in clef]) == ["", "", "", "𝄞", ""]


def test_broken_utf8_is_replaced_and_an_unfinished_character_at_the_end_too():
    assert shown([b"a\xff", b"b", "€".encode()[:2]]) == ["a\ufffd", "b", "", "\ufffd"]
    assert shown([b"\xe2", b"b"]) == ["", "\ufffdb", ""]


def test_an_unknown_id_is_a_replacement_character():
    assert TextStream([b"a"]).add(5) == "\ufffd"


def test_text_ends_before_a_stop_string_wherever_tokens_end():
    assert shown([b"ab", b"END", b"no"], "END") == ["ab", "", ""]
    assert shown([b"abE", b"N", b"Dno"], "END") == ["ab", "", "", ""]
    assert shown([b"abENDno"], "END") == ["ab", ""]
    assert shown([b"ab", "€".encode()[:1], "€".encode()[1:]], "€") == ["ab", "", "", ""]


def test_a_beginning_that_comes_to_nothing_is_shown_late_and_whole():
    assert shown([b"abE", b"N", b"x"], "END") == ["ab", "", "ENx", ""]
    assert shown([b"aab", b"aab", b"c"], "aabc") == ["", "aab", "", ""]
    assert shown([b"abEN"], "END") == ["ab", "EN"]


def test_the_first_of_several_stop_strings_ends_the_text():
    assert shown([b"a STOP b END"], "END", "STOP") == ["a ", ""]
    assert shown([b"a\n", b"\nb"], "\n\n", "b") == ["a", "", ""]


@given(st.text("ab€", max_size=12), st.lists(st.text("ab€", min_size=1, max_size=3), max_size=2))
def test_however_a_text_is_cut_the_same_is_shown_of_it(text: str, stops: list[str]):
    places = [place for place in map(text.find, stops) if place >= 0]
    expected = text[: min(places)] if places else text
    whole = "".join(shown([text.encode()], *stops))
    by_bytes = "".join(shown([bytes([byte]) for byte in text.encode()], *stops))
    assert whole == expected
    # Byte by byte the stop string that is complete first ends the text.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    first = [stop for stop in stops if stop in text and text.find(stop) + len(stop) == min(ends)]
    begins = [text.find(stop) for stop in first]
    assert by_bytes == (text[: min(begins)] if begins else text)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="a stop string is empty"):
        TextStream([b"a"], ["x", ""])
