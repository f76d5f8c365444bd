"""Tokens are chosen as asked: the likeliest, by the softmax, or from exactly the nucleus."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference.sampling import choose, nucleus, sampling, tempered
from tests.shapes import compiled, normal

V = 40


def nucleus_by_loop(logits_V: np.ndarray, top_p: float) -> set[int]:
    """The likeliest tokens, one by one, until they have `top_p` of the probability."""
    p_V = np.exp(logits_V - logits_V.max(), dtype=np.float64)
    p_V /= p_V.sum()
    inside, total = set(), 0.0
    for token in sorted(range(len(p_V)), key=lambda token: (-p_V[token], token)):
        if total >= top_p:
            break
        inside.add(token)
        total += p_V[token]
    return inside


def drawn(logits_V: jax.Array, rows: int, position: int = 7, **how: float) -> np.ndarray:
    """`rows` tokens chosen after one position."""
    logits_BV = jnp.broadcast_to(logits_V[None], (rows, V))
    return np.asarray(compiled(choose)(logits_BV, jnp.int32(position), sampling(**how)))


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.99, 0.999999])
def test_the_nucleus_is_that_of_a_loop_over_tokens(x64: None, top_p: float):
    logits_BV = 2 * normal(0, 5, V)
    logits_BV = logits_BV.at[1].set(0.0)  # all alike
    logits_BV = logits_BV.at[2, :20].set(logits_BV[2, 20:])  # each twice
    found_BV = np.asarray(compiled(nucleus)(logits_BV, jnp.float64(top_p)))
    for logits_V, found_V in zip(np.asarray(logits_BV), found_BV, strict=True):
        inside = nucleus_by_loop(logits_V, top_p)
        assert 1 <= len(inside) <= V
        assert set(np.flatnonzero(found_V > -np.inf)) == inside
        assert np.array_equal(found_V[list(inside)], logits_V[list(inside)])


def test_probabilities_that_add_up_to_top_p_exactly_are_the_nucleus(x64: None):
    logits_BV = jnp.log(jnp.asarray([[0.125, 0.5, 0.25, 0.125]]))
    for top_p, inside in ((0.5, [1]), (0.75, [1, 2]), (0.76, [0, 1, 2]), (0.876, [0, 1, 2, 3])):
        found_BV = nucleus(logits_BV, jnp.float64(top_p))
        assert np.flatnonzero(np.asarray(found_BV[0]) > -np.inf).tolist() == inside


@pytest.mark.parametrize(("temperature", "top_p"), [(2.0, 1.0), (1.0, 0.8), (2.0, 0.8)])
def test_samples_follow_the_softmax_within_the_nucleus(temperature: float, top_p: float):
    """A chi-squared test with a fixed key, and no token from outside."""
    rows, logits_V = 4000, 2 * normal(1, V)
    counted_V = np.bincount(
        drawn(logits_V, rows, seed=3, temperature=temperature, top_p=top_p), minlength=V
    )
    heated_V = np.asarray(logits_V, np.float64) / temperature
    inside = sorted(nucleus_by_loop(heated_V, top_p))
    assert counted_V[inside].sum() == rows
    p_V = np.exp(heated_V[inside] - heated_V.max())
    expected_V = rows * p_V / p_V.sum()
    often_V = expected_V >= 5
    error_V = (counted_V[inside] - expected_V) ** 2 / expected_V
    freedom = often_V.sum()
    assert freedom > 5
    assert error_V[often_V].sum() < freedom + 5 * np.sqrt(2 * freedom)  # five standard deviations


def test_beside_a_row_with_a_nucleus_one_without_keeps_all_its_tokens():
    """Though all but the likeliest are too rare to change a sum of float32."""
    logits_BV = jnp.zeros((2, V)).at[:, 3].set(30.0)
    found_BV = tempered(logits_BV, jnp.ones((2, 1)), jnp.asarray([[1.0], [0.5]]))
    assert np.isfinite(np.asarray(found_BV)).sum(1).tolist() == [V, 1]


def test_top_p_1_is_plain_sampling_to_the_bit():
    logits_V, key = normal(2, V), jax.random.fold_in(jax.random.key(5), 7)
    plain = jax.random.categorical(key, jnp.broadcast_to(logits_V[None], (50, V)))
    assert np.array_equal(drawn(logits_V, 50, seed=5, temperature=1.0), plain)


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1e-30])
def test_temperature_0_and_next_to_it_take_the_likeliest(temperature: float):
    logits_V = 1e4 * normal(3, V)
    found = drawn(logits_V, 3, seed=0, temperature=temperature, top_p=0.5)
    assert (found == np.argmax(logits_V)).all()
    assert found.dtype == np.int32


def test_seed_and_position_decide_what_is_drawn():
    draw = partial(drawn, normal(4, V), 50, temperature=1.0)
    assert np.array_equal(draw(seed=1), draw(seed=1))
    assert not np.array_equal(draw(seed=1), draw(seed=2))
    assert not np.array_equal(draw(seed=1), draw(seed=1, position=8))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; allowed: from 0 to below 1e38"),
        ({"temperature": float("nan")}, "temperature is nan; allowed: from 0"),
        ({"temperature": float("inf")}, "temperature is inf; allowed: from 0"),
        ({"temperature": 1e38}, "allowed: from 0 to below 1e38"),
        ({"top_p": 0.0}, "top-p is 0.0; allowed: above 0, at most 1"),
        ({"top_p": 1e-50}, "top-p is 1e-50; allowed: above 0, at most 1"),
        ({"top_p": 1.1}, "top-p is 1.1; allowed: above 0, at most 1"),
        ({"seed": -1}, "seed is -1; allowed: 0 to"),
    ],
)
def test_what_is_no_way_to_choose_is_refused(how: dict, said: str):
    with pytest.raises(ValueError, match=said):
        sampling(**({"seed": 0} | how))
