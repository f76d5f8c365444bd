"""Attention in blocks against the plain form: numbers, gradients, and what is never made."""

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.model import blockwise, mla
from dsv3_jax.model.attention import plain_attention
from dsv3_jax.model.blockwise import blockwise_attention
from tests.jaxprs import equations, intermediates
from tests.model.test_attention import (
    B,
    H,
    N,
    check_near_float32,
    inputs,
    segments_of,
    value_and_gradients,
    value_and_square,
)
from tests.shapes import compiled, random_model, random_tokens, tiny_model
from tests.tolerances import FLOAT64, assert_close


@pytest.mark.parametrize("length", [1, 4, 10, 16])
def test_blocks_equal_plain(x64, strict_dtypes, monkeypatch, length: int):
    """Of one token, one whole block, two and a part, four."""
    monkeypatch.setattr(blockwise, "BLOCK", 4)
    args = inputs(length)
    expected = value_and_gradients(plain_attention, *args)
    assert_close(value_and_gradients(blockwise_attention, *args), expected, FLOAT64)


def test_segments_cross_blocks_and_hide_whole_ones(x64, strict_dtypes, monkeypatch):
    """Queries of a late segment see no key of the first blocks, where their maximum stays -inf."""
    monkeypatch.setattr(blockwise, "BLOCK", 4)
    args, segments = inputs(14), segments_of([[3, 14], [6, 7, 14]])
    expected = value_and_gradients(plain_attention, *args, segments=segments)
    found = value_and_gradients(blockwise_attention, *args, segments=segments)
    assert_close(found, expected, FLOAT64)


def test_in_bfloat16_blocks_are_near_float32(strict_dtypes, monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 4)
    check_near_float32(blockwise_attention)


@pytest.mark.parametrize("length", [600, 65_536])
def test_memory_is_linear_in_the_length(length: int):
    """Forward and backward: no array is larger than the queries or a block of scores."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(4, jnp.float32)[:3]]
    shapes = [s.update(shape=(B, length, *s.shape[2:])) for s in shapes]
    padded = -(-length // 512) * 512
    largest = max(x.size for x in intermediates(value_and_square(blockwise_attention), *shapes))
    assert largest <= B * H * max(512**2, padded * N)


def test_long_rows_of_a_model_are_computed_in_blocks(x64, monkeypatch):
    """And give the same logits."""
    cfg = tiny_model(num_layers=1, mtp_depth=0)
    model, tokens_BT = random_model(cfg, jnp.float64), random_tokens(cfg, 2, 10)
    expected = compiled(lambda tokens: model(tokens))(tokens_BT)
    monkeypatch.setattr(mla, "LONGEST_IN_CHUNKS", 9)
    monkeypatch.setattr(blockwise, "BLOCK", 4)
    assert [e for e in equations(model, tokens_BT) if e.primitive.name == "while"]
    assert_close(compiled(lambda tokens: model(tokens))(tokens_BT), expected, FLOAT64)
