"""Chunked cross-entropy against the plain form, and the plain form against a loop over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.cross_entropy import (
    NUM_CHUNKS,
    cross_entropy,
    cross_entropy_and_dhead,
    log_probs,
    plain_cross_entropy,
)
from tests.jaxprs import intermediates
from tests.shapes import compiled, normal
from tests.tolerances import BFLOAT16, FLOAT32, FLOAT64, assert_close

D, V = 5, 11


def inputs(rows: int, length: int, dtype=None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """h, head and labels, of which every third is not counted."""
    labels = np.random.default_rng(0).integers(0, V, (rows, length))
    labels.reshape(-1)[2::3] = -1
    h, head = normal(1, rows, length, D, dtype=dtype), normal(2, D, V, dtype=dtype)
    return h, head, jnp.asarray(labels, jnp.int32)


def value_and_gradients(
    function, h, head, labels, cotangent: float = 1.0, weights: jax.Array | None = None
) -> tuple:
    def run(h, head, labels, weights):
        value, pull = jax.vjp(lambda h, head: function(h, head, labels, weights), h, head)
        return value, pull(jnp.asarray(cotangent, value.dtype))

    return compiled(run)(h, head, labels, weights)


def test_plain_equals_a_loop_over_tokens(x64):
    h, head, labels = (np.asarray(x) for x in inputs(2, 7))
    expected = 0.0
    for b, t in np.ndindex(labels.shape):
        if labels[b, t] >= 0:
            exp = np.exp(h[b, t] @ head)
            expected -= np.log(exp[labels[b, t]] / exp.sum())
    assert_close(plain_cross_entropy(h, head, labels), np.float64(expected), FLOAT64)


@pytest.mark.parametrize(
    ("rows", "length", "cotangent"), [(1, 1, 1.0), (2, 4, -0.37), (3, 5, 2.5), (1, 17, 0.0)]
)
def test_chunked_equals_plain(x64, strict_dtypes, rows: int, length: int, cotangent: float):
    args = inputs(rows, length)
    actual = value_and_gradients(cross_entropy, *args, cotangent)
    assert_close(actual, value_and_gradients(plain_cross_entropy, *args, cotangent), FLOAT64)
    # Without a gradient the loss comes from a program of its own.
    assert_close(compiled(cross_entropy)(*args), actual[0], FLOAT64)


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (3, 5)])
def test_a_weight_is_a_factor_of_its_label(x64, strict_dtypes, rows: int, length: int):
    """Of any sign and 0, in value and gradients; where a label is not counted it counts nothing."""
    args, weights = inputs(rows, length), normal(3, rows, length)
    weights = weights.at[0, 0].set(0.0 if length > 1 else -2.0)
    actual = value_and_gradients(cross_entropy, *args, 0.7, weights)
    h, head, labels = args
    of_one = [
        value_and_gradients(cross_entropy, h, head, jnp.full_like(labels, -1).at[b, t].set(label))
        for (b, t), label in np.ndenumerate(labels)
    ]
    expected = jax.tree.map(
        lambda *x: jnp.einsum("i,i...->...", weights.ravel(), jnp.stack(x)), *of_one
    )
    expected = expected[0], jax.tree.map(lambda x: 0.7 * x, expected[1])
    assert_close(actual, expected, FLOAT64)
    assert_close(value_and_gradients(plain_cross_entropy, *args, 0.7, weights), expected, FLOAT64)
    value, dhead = compiled(cross_entropy_and_dhead)(*args, weights)
    assert_close((value, 0.7 * dhead), (expected[0], expected[1][1]), FLOAT64)


def test_weights_of_one_are_none(strict_dtypes):
    """Bit for bit."""
    h, head, labels = inputs(3, 5, jnp.float32)
    ones = jnp.ones(labels.shape, jnp.float32)
    one, other = (
        value_and_gradients(cross_entropy, h.astype(jnp.bfloat16), head, labels, 1.0, weights)
        for weights in (ones, None)
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_log_probs_are_the_terms_of_the_loss(x64, strict_dtypes):
    h, head, labels = inputs(3, 5)
    found = compiled(log_probs)(h, head, labels)
    assert found.shape == labels.shape
    np.testing.assert_array_equal(np.asarray(found)[labels < 0], 0.0)
    for (b, t), label in np.ndenumerate(labels):
        if label >= 0:
            one = jnp.full_like(labels, -1).at[b, t].set(label)
            assert_close(-found[b, t], plain_cross_entropy(h, head, one), FLOAT64)


def test_no_label_gives_zero_loss_and_zero_gradients():
    h, head, labels = inputs(2, 5, jnp.float32)
    none = jnp.full_like(labels, -1)
    for x in jax.tree.leaves(value_and_gradients(cross_entropy, h, head, none)):
        np.testing.assert_array_equal(x, np.zeros(x.shape))


def test_huge_logits_do_not_overflow(strict_dtypes):
    h, head, labels = inputs(2, 5, jnp.float32)
    args = 100 * h, 100 * head, labels
    actual = value_and_gradients(cross_entropy, *args)
    assert_close(actual, value_and_gradients(plain_cross_entropy, *args), FLOAT32)


def test_bfloat16_hidden_states_leave_loss_and_head_gradient_in_float32(strict_dtypes):
    h, head, labels = inputs(3, 5, jnp.float32)
    h = h.astype(jnp.bfloat16)
    value, (dh, dhead) = value_and_gradients(cross_entropy, h, head, labels)
    assert (value.dtype, dh.dtype, dhead.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert (dhead != dhead.astype(jnp.bfloat16).astype(jnp.float32)).any()
    exact, (exact_dh, exact_dhead) = value_and_gradients(
        plain_cross_entropy, h.astype(jnp.float32), head, labels
    )
    assert_close(value, exact, BFLOAT16)
    assert_close(dh, exact_dh, BFLOAT16)
    assert_close(dhead, exact_dhead, BFLOAT16)


def test_the_cotangent_is_not_rounded_to_the_activations_dtype():
    """In bfloat16 1 / 3 is off by 0.2%, and so would be the body's gradient against the head's."""
    h, head, labels = inputs(3, 5, jnp.float32)
    h = h.astype(jnp.bfloat16)
    _, (dh, _) = value_and_gradients(cross_entropy, h, head, labels)
    _, (third, _) = value_and_gradients(cross_entropy, h, head, labels, 1 / 3)
    expected = (dh.astype(jnp.float32) * (1 / 3)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(third, expected)


def test_no_logits_of_all_tokens_exist():
    """Neither forward nor backward; the same check finds the plain form's."""
    tokens, vocab = 6 * 16, 50

    def largest(function) -> int:
        h = jax.ShapeDtypeStruct((6, 16, D), jnp.float32)
        head = jax.ShapeDtypeStruct((D, vocab), jnp.float32)
        labels = jax.ShapeDtypeStruct((6, 16), jnp.int32)
        run = jax.value_and_grad(lambda *args: 2 * function(*args), (0, 1))
        return max(aval.size for aval in intermediates(run, h, head, labels))

    assert largest(plain_cross_entropy) == tokens * vocab
    assert largest(cross_entropy) == tokens * vocab // NUM_CHUNKS
