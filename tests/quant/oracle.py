"""Low precision the slow way: blocks one by one, numbers looked up in tables, GEMMs in float64."""

from typing import NamedTuple

import numpy as np

from dsv3_jax.quant.recipes import Operand, Rule
from tests.quant.number_tables import TABLES, nearest


class Products(NamedTuple):
    """Of one linear: each with the sum over k of |a| |b|, by which errors are judged."""

    y: np.ndarray
    dx: np.ndarray
    dw: np.ndarray
    y_size: np.ndarray
    dx_size: np.ndarray
    dw_size: np.ndarray


def rounded(x: np.ndarray, operand: Operand) -> np.ndarray:
    """x [D, F] as the operand holds it, float32."""
    block, table = operand.block or x.shape, TABLES[operand.fmt]
    largest, out = np.float32(max(table.values())), np.zeros(x.shape, np.float32)
    for i in range(0, x.shape[0], block[0]):
        for j in range(0, x.shape[1], block[1]):
            at = np.s_[i : i + block[0], j : j + block[1]]
            amax = np.abs(x[at]).max()
            scale = np.maximum(amax * np.float32(1 / largest), np.finfo(np.float32).tiny)
            if operand.scale == "pow2" and amax:
                mantissa, exponent = np.frexp(float(amax) / float(largest))  # in [0.5, 1)
                scale = np.float32(2.0 ** (exponent - (mantissa == 0.5)))
            scale = scale if amax else np.float32(1)
            quotients = np.clip(x[at] / scale, -largest, largest)
            numbers = nearest(quotients.ravel(), table).reshape(quotients.shape)
            out[at] = numbers.astype(np.float32) * scale
    return out


def products(x_XD: np.ndarray, w_DF: np.ndarray, dy_XF: np.ndarray, rule: Rule) -> Products:
    """The three GEMMs over operands that were rounded on their own."""
    w, kept = rounded(w_DF, rule.weight), rounded(x_XD, rule.kept)
    pairs = (
        (rounded(x_XD, rule.input), w),
        (rounded(dy_XF, rule.grad_output), w.T),
        (rounded(kept, rule.wgrad_input).T, rounded(dy_XF, rule.wgrad_grad_output)),
    )
    pairs = [(a.astype(float), b.astype(float)) for a, b in pairs]
    return Products(*(a @ b for a, b in pairs), *(abs(a) @ abs(b) for a, b in pairs))
