"""Casts against ml_dtypes where it has the type, against tables of all numbers where it has not."""

import jax.numpy as jnp
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
from tests.quant.number_tables import ML, TABLES, hard_numbers, nearest
from tests.shapes import compiled


def cast(x: np.ndarray, name: str) -> np.ndarray:
    return np.asarray(compiled(lambda x: FORMATS[name].decode(FORMATS[name].encode(x)))(x))


@pytest.mark.parametrize("name", TABLES)
def test_a_cast_is_the_nearest_number_of_the_table(name: str):
    x = hard_numbers(TABLES[name])
    np.testing.assert_array_equal(cast(x, name), nearest(x, TABLES[name]).astype(np.float32))


@pytest.mark.parametrize("name", TABLES)
def test_rounding_without_a_code_is_the_same_to_the_bit(name: str):
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e38, -1e38], np.float32)
    x = np.concatenate([hard_numbers(TABLES[name]), special])
    actual, expected = np.asarray(compiled(FORMATS[name].round)(x)), cast(x, name)
    assert np.array_equal(np.isnan(actual), np.isnan(expected))
    finite = ~np.isnan(expected)
    assert np.array_equal(actual[finite].view(np.uint32), expected[finite].view(np.uint32))


@pytest.mark.parametrize("name", TABLES)
def test_every_number_has_its_code(name: str):
    """Both signs; HiFloat8 has one zero."""
    fmt, (codes, values) = FORMATS[name], zip(*TABLES[name].items(), strict=True)
    encode, decode = compiled(fmt.encode), compiled(fmt.decode)
    stored = encode(np.array(values, np.float32))
    unsigned = jnp.uint16 if name == "e5m6" else jnp.uint8
    assert np.asarray(stored).view(unsigned).tolist() == list(codes)
    assert decode(stored).tolist() == list(values)
    negative = np.asarray(encode(-np.array(values, np.float32))).view(unsigned)[1:]
    assert negative.tolist() == [code + 2 ** (fmt.bits - 1) for code in codes[1:]]


def test_what_is_not_finite_has_its_code():
    """E5M6 as float16 has it; HiFloat8 as published."""
    x = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    e5m6, hif8 = (compiled(FORMATS[name].encode)(x) for name in ("e5m6", "hif8"))
    assert e5m6.tolist() == [0x7C0, 0xFC0, 0x7E0]
    assert hif8.tolist() == [0x6F, 0xEF, 0x80]


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
    at, below = (
        np.sum((start <= values) & (values < 2 * start))
        for start in (fmt.smallest_normal, fmt.smallest_normal / 2)
    )
    assert at > below
    assert len(values) < 2 ** (fmt.bits - 1)


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_cast_loses_is_counted(name: str):
    fmt = FORMATS[name]
    x = np.array(
        [fmt.largest, 1.01 * fmt.largest, -3 * fmt.largest, np.inf, np.nan, 0, fmt.smallest,
         fmt.smallest * 0.4, -fmt.smallest * 1e-9, 1e-40], np.float32
    )  # fmt: skip
    assert tuple(map(int, compiled(lambda x: lost(x, name))(x))) == (2, 2)


@pytest.mark.parametrize("shape", [(8,), (3, 5), (2, 0), (0, 4), (4, 1)])
def test_codes_of_12_bits_come_back_from_their_bytes(shape: tuple[int, ...]):
    codes = np.random.default_rng(0).integers(0, 4096, shape, np.uint16, endpoint=False)
    packed = compiled(pack12)(codes)
    assert packed.dtype == jnp.uint8
    assert packed.shape == (*shape[:-1], 3 * -(-shape[-1] // 2))
    unpacked = compiled(lambda packed: unpack12(packed, shape[-1]))(packed)
    np.testing.assert_array_equal(unpacked, codes)


def test_powers_of_two_keep_their_value_in_one_byte():
    scales = np.exp2(np.arange(-126, 128)).astype(np.float32)
    stored = to_ue8m0(jnp.asarray(scales))
    assert stored.dtype == jnp.float8_e8m0fnu
    np.testing.assert_array_equal(np.asarray(stored).astype(np.float32), scales)
    np.testing.assert_array_equal(from_ue8m0(stored), scales)


@pytest.mark.parametrize("name", FORMATS)
def test_floats_of_other_widths_are_cast_by_way_of_float32(x64, name: str):
    x = np.array([1.3, -0.07, 3000.0, 1e-9])
    for dtype in (jnp.float64, jnp.bfloat16, jnp.float16):
        stored = compiled(FORMATS[name].encode)(jnp.asarray(x, dtype))
        expected = compiled(FORMATS[name].encode)(jnp.asarray(x, dtype).astype(jnp.float32))
        assert stored.shape == x.shape
        assert stored.tolist() == expected.tolist()


def test_another_format_is_refused_with_a_list():
    with pytest.raises(ValueError, match="fmt is 'e3m4'; allowed: 'e4m3', 'e5m2', 'e5m6', 'hif8'"):
        format_of("e3m4")
