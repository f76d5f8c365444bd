"""Casts against ml_dtypes where it has the type, against tables of all numbers where it has not."""

import itertools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.quant.formats import (
    FORMATS,
    format_of,
    from_ue8m0,
    lost,
    pack12,
    to_ue8m0,
    unpack12,
)
from tests.shapes import compiled

ML = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


def hifloat8_table() -> dict[int, float]:
    """Code -> number, from the bits as text."""
    table = {0: 0.0, **{m: 2.0 ** (m - 23) for m in range(1, 8)}}
    for prefix, exponents, mantissas in (("11", 4, 1), ("10", 3, 2), ("01", 2, 3), ("001", 1, 3)):
        for sign, *bits in itertools.product("01", repeat=exponents):
            magnitude = int("1" + "".join(bits), 2)
            for m in range(2**mantissas):
                code = int(f"{prefix}{sign}{''.join(bits)}{m:0{mantissas}b}", 2)
                power = -magnitude if sign == "1" else magnitude
                table[code] = 2.0**power * (1 + m / 2**mantissas)
    table |= {8 + m: 1 + m / 8 for m in range(8)}
    del table[0x6F]  # infinity
    return table


def e5m6_table() -> dict[int, float]:
    """Code -> number: the finite float16 whose last four bits are 0."""
    codes = np.arange(0x7C0)
    return dict(enumerate((codes << 4).astype(np.uint16).view(np.float16).astype(float).tolist()))


TABLES = {
    **{
        name: {
            code: float(value)
            for code, value in enumerate(np.arange(128).astype(np.uint8).view(dtype))
            if np.isfinite(value)
        }
        for name, dtype in ML.items()
    },
    "e5m6": e5m6_table(),
    "hif8": hifloat8_table(),
}


def hard_numbers(table: dict[int, float]) -> np.ndarray:
    """Float32 of both signs: all numbers, the middles between neighbours and what lies beside
    those, what is beyond the largest, the smallest float, and random ones of every size.
    """
    values = np.sort(np.array([*table.values()]))
    middles = ((values[:-1] + values[1:]) / 2).astype(np.float32)
    beside = [np.nextafter(middles, np.float32(to)) for to in (0, np.inf)]
    draw = np.random.default_rng(0)
    random = draw.standard_normal(4000) * 2.0 ** draw.integers(-30, 20, 4000)
    beyond = values[-1] * np.array([1.01, 1.5, 2, 1e10, 1e20])
    x = np.concatenate([values, middles, *beside, random, beyond, [np.finfo(np.float32).tiny]])
    return np.concatenate([x, -x]).astype(np.float32)


def nearest(x: np.ndarray, table: dict[int, float]) -> np.ndarray:
    """By distance to every number; of two as near, the one of the even code."""
    codes, values = np.array([*table]), np.array([*table.values()])
    distance = np.abs(np.minimum(np.abs(x.astype(float)), values.max())[:, None] - values)
    order = np.where(distance == distance.min(1, keepdims=True), 1 + codes % 2, 9)
    return values[order.argmin(1)] * np.where(np.signbit(x), -1, 1)


def cast(x: np.ndarray, name: str) -> np.ndarray:
    return np.asarray(compiled(lambda x: FORMATS[name].decode(FORMATS[name].encode(x)))(x))


@pytest.mark.parametrize("name", TABLES)
def test_a_cast_is_the_nearest_number_of_the_table(name: str):
    x = hard_numbers(TABLES[name])
    np.testing.assert_array_equal(cast(x, name), nearest(x, TABLES[name]).astype(np.float32))


@pytest.mark.parametrize("name", ML)
def test_a_cast_is_that_of_ml_dtypes_in_every_bit(name: str):
    """On numbers within the range, a million of them at random bits among them."""
    bits = np.random.default_rng(1).integers(0, 2**32, 10**6, np.uint32, endpoint=False)
    x = np.concatenate([hard_numbers(TABLES[name]), bits.view(np.float32)])
    x = x[np.abs(x) <= FORMATS[name].largest]  # NaN and what saturates have tests of their own
    ours = np.asarray(compiled(FORMATS[name].encode)(x)).view(np.uint8)
    np.testing.assert_array_equal(ours, x.astype(ML[name]).view(np.uint8))


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_finite_stays_so_and_zero_is_zero(name: str):
    x = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0], np.float32)
    made = cast(x, name)
    assert np.isnan(made[:2]).all()
    assert not np.isfinite(made[2:4]).any()
    if name != "e4m3":  # which has no infinity
        np.testing.assert_array_equal(made[2:4], x[2:4])
    assert made[4:].tolist() == [0, 0]


@pytest.mark.parametrize("name", FORMATS)
def test_the_ends_of_a_format_are_as_told(name: str):
    fmt, values = FORMATS[name], np.sort(np.array([*TABLES[name].values()]))
    assert (values[-1], values[1]) == (fmt.largest, fmt.smallest)
    assert fmt.smallest_normal in values
    assert len(values) < 2 ** (fmt.bits - 1)


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_cast_loses_is_counted(name: str):
    fmt = FORMATS[name]
    x = np.array(
        [fmt.largest, 1.01 * fmt.largest, -3 * fmt.largest, np.inf, np.nan, 0, fmt.smallest,
         fmt.smallest * 0.4, -fmt.smallest * 1e-9], np.float32
    )  # fmt: skip
    assert tuple(map(int, lost(jnp.asarray(x), name))) == (2, 2)


@pytest.mark.parametrize("shape", [(8,), (3, 5), (2, 0), (4, 1)])
def test_codes_of_12_bits_come_back_from_their_bytes(shape: tuple[int, ...]):
    codes = np.random.default_rng(0).integers(0, 4096, shape, np.uint16, endpoint=False)
    packed = pack12(jnp.asarray(codes))
    assert packed.dtype == jnp.uint8
    assert packed.shape == (*shape[:-1], 3 * -(-shape[-1] // 2))
    np.testing.assert_array_equal(unpack12(packed, shape[-1]), codes)


def test_powers_of_two_keep_their_value_in_one_byte():
    scales = np.exp2(np.arange(-126, 128)).astype(np.float32)
    stored = to_ue8m0(jnp.asarray(scales))
    assert stored.dtype == jnp.float8_e8m0fnu
    np.testing.assert_array_equal(np.asarray(stored).astype(np.float32), scales)
    np.testing.assert_array_equal(from_ue8m0(stored), scales)


def test_another_format_is_refused_with_a_list():
    with pytest.raises(ValueError, match="fmt is 'e3m4'; allowed: 'e4m3', 'e5m2', 'e5m6', 'hif8'"):
        format_of("e3m4")
