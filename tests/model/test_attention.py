"""Chunked attention against the plain form, and the plain form against a loop over queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model import attention as source
from dsv3_jax.model.attention import attention, plain_attention
from tests.jaxprs import equations, intermediates
from tests.shapes import compiled, normal
from tests.tolerances import BFLOAT16, FLOAT32, FLOAT64, assert_close

B, H, N, U = 2, 3, 5, 4  # query and key size N, value size U
SCALE = 0.7


def inputs(length: int, dtype=None, keys: int | None = None) -> list[jax.Array]:
    """q, k, v and a cotangent of the output."""
    keys = keys or length
    shapes = (B, length, H, N), (B, keys, H, N), (B, keys, H, U), (B, length, H, U)
    return [normal(seed, *shape, dtype=dtype) for seed, shape in enumerate(shapes)]


def value_and_gradients(function, *args, segments=None) -> tuple:
    def run(q, k, v, do):
        o, pull = jax.vjp(lambda q, k, v: function(q, k, v, SCALE, segments), q, k, v)
        return o, pull(do)

    return compiled(run)(*args)  # a new function each time: chunk sizes are no part of jit's key


def segments_of(ends: list[list[int]]) -> jax.Array:
    """int32 [B, T], from where each row's segments end."""
    places = np.arange(ends[0][-1])
    rows = [np.searchsorted(row, places, side="right") for row in ends]
    return jnp.asarray(np.stack(rows), jnp.int32)


def check_near_float32(form) -> None:
    """Of 10 tokens in bfloat16."""
    args = inputs(10, jnp.bfloat16)
    actual = value_and_gradients(form, *args)
    assert {x.dtype for x in jax.tree.leaves(actual)} == {jnp.dtype(jnp.bfloat16)}
    exact = value_and_gradients(plain_attention, *(x.astype(jnp.float32) for x in args))
    assert_close(actual, exact, BFLOAT16)


def value_and_square(function):
    """Sum of squares of the output and its gradient: forward and backward in one trace."""
    return jax.value_and_grad(lambda q, k, v: jnp.sum(function(q, k, v, SCALE) ** 2), (0, 1, 2))


def test_plain_equals_a_loop_over_queries(x64):
    q, k, v, _ = (np.asarray(x) for x in inputs(4, keys=6))
    expected = np.zeros((B, 4, H, U))
    for b, t, h in np.ndindex(B, 4, H):
        seen = t + 3  # the last of 4 queries stands on the last of 6 keys
        p = np.exp(k[b, :seen, h] @ q[b, t, h] * SCALE)
        expected[b, t, h] = p / p.sum() @ v[b, :seen, h]
    assert_close(plain_attention(q, k, v, SCALE), expected, FLOAT64)


@pytest.mark.parametrize(("length", "chunks"), [(1, 1), (4, 1), (5, 2), (25, 3)])
def test_chunked_equals_plain(x64, strict_dtypes, monkeypatch, length: int, chunks: int):
    monkeypatch.setattr(source, "MIN_CHUNK", 4)
    monkeypatch.setattr(source, "MAX_CHUNKS", 3)
    args = inputs(length)
    dots = [
        e for e in equations(value_and_square(attention), *args[:3]) if "dot" in e.primitive.name
    ]
    # Two products forward; backward the scores again, dP, dq, dk, dv; and one for delta.
    assert len(dots) == 7 * chunks + 1
    actual = value_and_gradients(attention, *args)
    assert_close(actual, value_and_gradients(plain_attention, *args), FLOAT64)


def test_a_segment_is_attended_to_as_if_it_stood_alone(x64, strict_dtypes, monkeypatch):
    """Plain and chunked; segments cross the borders of chunks, and differ between rows."""
    monkeypatch.setattr(source, "MIN_CHUNK", 4)
    args = inputs(10)
    ends = [[3, 10], [6, 7, 10]]
    segments = segments_of(ends)
    plain = value_and_gradients(plain_attention, *args, segments=segments)
    assert_close(value_and_gradients(attention, *args, segments=segments), plain, FLOAT64)
    for b, row in enumerate(ends):
        for start, stop in zip([0, *row], row, strict=False):
            alone = [x[b : b + 1, start:stop] for x in args]
            part = jax.tree.map(lambda x, at=(b, start, stop): x[at[0]][None, at[1] : at[2]], plain)
            assert_close(part, value_and_gradients(plain_attention, *alone), FLOAT64)


def test_chunked_equals_plain_at_full_chunk_size(strict_dtypes):
    """300 tokens are chunks of 128, 128 and 44."""
    args = inputs(300, jnp.float32)
    actual = value_and_gradients(attention, *args)
    assert_close(actual, value_and_gradients(plain_attention, *args), FLOAT32)


def test_chunked_in_bfloat16_is_near_float32(strict_dtypes, monkeypatch):
    monkeypatch.setattr(source, "MIN_CHUNK", 4)
    check_near_float32(attention)


@pytest.mark.parametrize("length", [300, 2100])
def test_no_score_tensor_of_all_rows_exists(length: int):
    """Neither forward nor backward; the same check finds the plain form's."""

    def largest(function) -> int:
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(4, jnp.float32)[:3]]
        shapes = [s.update(shape=(B, length, *s.shape[2:])) for s in shapes]
        return max(aval.size for aval in intermediates(value_and_square(function), *shapes))

    assert largest(plain_attention) == B * H * length**2
    # A chunk is 128 rows, or a sixteenth of them where that is more.
    assert largest(attention) <= B * H * max(128, length // 16 + 1) * length


def test_long_rows_are_cut_into_at_most_sixteen_chunks():
    q, k, v = (jax.ShapeDtypeStruct((1, 4100, 1, 2), jnp.float32) for _ in "qkv")
    traced = equations(lambda q, k, v: attention(q, k, v, SCALE), q, k, v)
    assert sum("dot" in e.primitive.name for e in traced) == 2 * 16
