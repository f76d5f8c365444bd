"""A hand-over's bytes carry every bit, and what is not all of one is refused."""

import pickle
import struct
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.inference.handover import Handover
from dsv3_jax.inference.requests import Request

# An array of each dtype that there is, and their widths.
ARRAYS = ((np.float32, 4), (ml_dtypes.bfloat16, 3), (ml_dtypes.float8_e4m3fn, 5), (np.float64, 1))


def made_up(slots: int = 3) -> Handover:
    """Every bit pattern is welcome, NaN too: bytes are compared."""
    rng = np.random.default_rng(slots)
    arrays = [
        np.frombuffer(rng.bytes(slots * width * np.dtype(kind).itemsize), kind).reshape(slots, -1)
        for kind, width in ARRAYS
    ]
    prompt, seed, end_ids = np.arange(slots), np.uint32(2**32 - 1), frozenset(np.array([3, 1]))
    request = Request(prompt, 9, np.float32(0.7), 0.9, seed, end_ids)
    tokens = [*range(slots), 63]
    form = {"model.yarn": {"factor": 1e-7}, "model.q_latent": None, "engine.drafts": 2}
    return Handover(request, tokens, [-1 / 3], form, tuple(arrays), arrays[0][:0])


def test_bytes_carry_every_bit():
    sent = made_up()
    come = Handover.from_bytes(sent.to_bytes())
    for one, other in zip(
        (*come.latents, come.hidden_WD), (*sent.latents, sent.hidden_WD), strict=True
    ):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    assert come.request == replace(sent.request, prompt=[0, 1, 2])
    assert (come.tokens, come.logprobs, come.form) == (sent.tokens, sent.logprobs, sent.form)
    assert come.to_bytes() == sent.to_bytes()


def refused(data: bytes) -> str:
    with pytest.raises(ValueError, match="hand-over") as caught:
        Handover.from_bytes(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bytes_that_are_cut_off_or_run_on_are_refused():
    data = made_up().to_bytes()
    for length in range(len(data)):
        refused(data[:length])
    said = f"a hand-over of {len(data)} bytes, of which {len(data) - 1} are here"
    assert refused(data[:-1]) == said
    refused(data + b"\0")


def test_bytes_of_something_else_are_refused():
    for data in (b"", b"\0" * 100, pickle.dumps([1]), b"{}", made_up().to_bytes()[1:]):
        assert refused(data) == f"{len(data)} bytes that are no hand-over: they begin otherwise"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"tokens"', b'"tokend"'),
        (b'"tokens": [0,', b'"tokens": {0,'),
        (b'"tokens": [0,', b'"tokens": [.,'),
        (b'"max_tokens"', b'"man_tokens"'),
        (b'"max_tokens": 9', b'"max_tokens":""'),
        (b'"prompt": [0, 1, 2]', b'"prompt": [0,1,2.0]'),
        (b'"float32"', b'"float23"'),
        (b'"float32"', b'"objects"'),
        (b'["float32", 3, 4]', b'["float32", 3, 5]'),
        (b'["float32", 3, 4]', b'["float32", 9, 4]'),
        (b'["float32", 3, 4]', b'["float32",-3,-4]'),
        (b'["float32", 3, 4]', b'["float32", true]'),
        (b'{"request"', b'["request"'),
        (b'{"request"', b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
    ],
)
def test_headers_that_say_something_else_are_refused(old: bytes, new: bytes):
    data = made_up().to_bytes()
    assert data.count(old) >= 1
    assert len(old) == len(new)
    assert refused(data.replace(old, new, 1)) == "a hand-over whose header cannot be read"


def test_a_header_longer_than_the_bytes_is_refused():
    data = bytearray(made_up().to_bytes())
    struct.pack_into("<Q", data, data.index(b"\n") + 9, 2**60)
    assert refused(bytes(data)) == "a hand-over whose header cannot be read"
