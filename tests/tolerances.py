"""The one table of tolerances, with a reason for each, and the comparison that uses it.

Every value is relative to the largest magnitude of the expected tensor: max|Δ| ≤ tol · max|g|.
A tolerance relative to each element would ask for digits that cancellation has already lost.
"""

import chex
import jax
import numpy as np

# Unit roundoff 1.1e-16. Two orders of summation over n terms differ by about √n roundoffs, so even
# n = 1e6 and ten such operations in a row stay at 1e-12; a missing or doubled term is far above.
FLOAT64 = 1e-11

# Unit roundoff 6e-8. A few layers deep, sums over some thousand terms differ by about 1e-5. Holds
# only while both programs choose the same experts: assert routing margins above 1e-4.
FLOAT32 = 2e-5

# Unit roundoff 2⁻⁸ = 0.004. Four roundings in a row (inputs and results of two GEMMs).
BFLOAT16 = 2**-6


def assert_close(actual: chex.ArrayTree, expected: chex.ArrayTree, tol: float) -> None:
    """Raise AssertionError unless each tensor has max|actual − expected| ≤ tol · max|expected|.

    Takes single arrays or trees of one structure. Shapes must agree exactly; an expected tensor of
    zeros must be met exactly; NaN and infinity are never close.
    """
    chex.assert_trees_all_equal_structs(actual, expected)
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    for (path, want), got in zip(leaves, jax.tree.leaves(actual), strict=True):
        name = jax.tree_util.keystr(path) or "array"
        got, want = np.asarray(got), np.asarray(want)
        assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
        wide = np.result_type(want.dtype, np.float64)
        error = np.max(np.abs(got.astype(wide) - want.astype(wide)), initial=0.0)
        scale = np.max(np.abs(want.astype(wide)), initial=0.0)
        assert error <= tol * scale, f"{name}: max|Δ| {error:.3e} > {tol:.1e} · {scale:.3e}"
