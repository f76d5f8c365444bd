"""Windows over a text: every token once, with as much before it as promised."""

import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.evaluate.rolling import TextScore, read_text, windows


@given(tokens=st.integers(0, 60), longest=st.integers(1, 20), share=st.floats(0, 1))
def test_every_token_is_scored_once_with_the_context_that_is_promised(tokens, longest, share):
    stride = 1 + int(share * (longest - 1))
    done = 0
    for number, window in enumerate(windows(tokens, longest, stride)):
        assert 0 <= window.begin < window.end <= tokens
        assert window.end - window.begin <= longest
        # Place p's token predicts that of place p + 1.
        first = window.end - window.scored
        assert first == done
        if number:
            assert first - window.begin >= longest - stride
            assert window.end - window.begin == longest
        done = window.end
    assert done == tokens


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_that_leaves_out_tokens_is_refused(stride):
    with pytest.raises(ValueError, match=rf"stride is {stride}; allowed: 1 to .* = 8"):
        list(windows(20, 8, stride))


def test_bits_per_byte_and_perplexity():
    score = TextScore(nats=8 * math.log(2), tokens=4, bytes=2)
    assert score.bits_per_byte == pytest.approx(4)
    assert score.perplexity == pytest.approx(4)
    assert score + TextScore(1.0, 2, 3) == TextScore(score.nats + 1, 6, 5)
    assert TextScore(1e6, 1, 1).perplexity == math.inf


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "latin").write_bytes(b"ab\xff")
    (tmp_path / "text").write_bytes("a\r\n€".encode())
    with pytest.raises(ValueError, match="empty is empty; allowed: text of one byte"):
        read_text(tmp_path / "empty")
    with pytest.raises(ValueError, match="latin: byte 0xff at offset 2 is not UTF-8"):
        read_text(tmp_path / "latin")
    with pytest.raises(OSError, match="No such file"):
        read_text(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a plain file"):
        read_text(tmp_path / "pipe")
    assert read_text(tmp_path / "text") == "a\r\n€"
