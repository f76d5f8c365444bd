"""All numbers of the small formats, and rounding by looking at every one: slow and obvious."""

import itertools

import ml_dtypes
import numpy as np

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
    those, what is beyond the largest, the smallest normal float, and random ones of every size.
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
    """By distance to every number; of two as near the one of the even code, or of HiFloat8 the
    larger one.
    """
    codes, values = np.array([*table]), np.array([*table.values()])
    distance = np.abs(np.minimum(np.abs(x.astype(float)), values.max())[:, None] - values)
    preferred = -values if table is TABLES["hif8"] else codes % 2
    order = np.where(distance == distance.min(1, keepdims=True), preferred, np.inf)
    return values[order.argmin(1)] * np.where(np.signbit(x), -1, 1)
