"""The router's product in parts against float64's, and when it is taken."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model import router
from dsv3_jax.model.router import Router
from dsv3_jax.model.router_product import fits, in_parts, router_product
from tests.jaxprs import equations
from tests.shapes import compiled, normal, random_part, tiny_model

B, T, D, E = 2, 50, 64, 8
CFG = tiny_model()


def operands() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, a weight of sizes from 2^-20 to 2^20, a gradient."""
    sizes = 2.0 ** np.random.default_rng(0).integers(-20, 21, (D, E))
    w_DE = jnp.asarray(normal(1, D, E) * sizes, jnp.float32)
    return jnp.asarray(normal(0, B, T, D), jnp.bfloat16), w_DE, normal(2, B, T, E, dtype="float32")


def off(actual: jax.Array, a: np.ndarray, b: np.ndarray, spec: str) -> float:
    """Largest error, in sums of magnitudes."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    size = np.einsum(spec, abs(a), abs(b))
    return float((abs(np.asarray(actual, float) - np.einsum(spec, a, b)) / size).max())


def test_parts_sum_up_to_the_last_bit():
    _, w_DE, _ = operands()
    w_DE = w_DE.at[0, :3].set(jnp.asarray([0, -0.0, np.float32(1) - np.float32(2) ** -24]))
    parts = np.asarray(compiled(partial(in_parts, axis=0))(w_DE), float)
    np.testing.assert_array_equal(parts.sum(0), np.asarray(w_DE, float))


def test_product_and_gradients_are_as_exact_as_float32():
    x, w, dy = operands()
    y, pull = compiled(lambda *args: jax.vjp(router_product, *args))(x, w)
    dx, dw = pull(dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert off(y, x, w, "btd,de->bte") < 1e-6
    assert off(dw, x, dy, "btd,bte->de") < 1e-6
    assert off(dx, dy, w, "bte,de->btd") < 2**-8  # rounded to bfloat16


def test_one_part_less_would_be_less_exact():
    x, w, _ = operands()
    two = jnp.einsum("btd,dpe->bte", x, in_parts(w, 1)[:, :2], preferred_element_type=jnp.float32)
    assert off(two, x, w, "btd,de->bte") > 2e-6


def test_a_cpu_multiplies_in_float32():
    assert not fits(jnp.zeros((2, 256, D), jnp.bfloat16))


def test_a_hopper_takes_it_for_many_tokens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dsv3_jax.model.router_product.lacking", lambda: None)
    assert fits(jnp.zeros((2, 256, D), jnp.bfloat16))
    assert not fits(jnp.zeros((2, 255, D), jnp.bfloat16))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_hopper_takes_it_for_bfloat16(monkeypatch: pytest.MonkeyPatch, dtype):
    monkeypatch.setattr("dsv3_jax.model.router_product.lacking", lambda: None)
    monkeypatch.setattr("dsv3_jax.model.router_product.LEAST_TOKENS", B * T)
    part, x = random_part(Router, CFG, jnp.float32), normal(0, B, T, CFG.d_model, dtype=dtype)
    run = partial(lambda x: part(x, np.ones((B, T), bool))[0])
    dots = [e for e in equations(run, x) if "dot" in e.primitive.name]
    assert [dot.invars[0].aval.dtype for dot in dots] == [dtype]
    actual = compiled(run)(x)
    monkeypatch.setattr(router, "fits", lambda _: False)
    expected = compiled(lambda x: run(x))(x)
    np.testing.assert_array_equal(actual.experts_BTK, expected.experts_BTK)
    np.testing.assert_allclose(actual.gates_BTK, expected.gates_BTK, rtol=1e-5)
