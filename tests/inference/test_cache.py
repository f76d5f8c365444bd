"""What is written into pages is read from them, and nothing else."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference import cache
from dsv3_jax.inference.cache import Cache, Pool, as_read, empty_pool
from tests.shapes import TINY, compiled, normal

CFG = replace(TINY, kv_latent=160)  # 1.25 blocks of an FP8 cache
TABLE_BY = jnp.asarray([[5, 1, 3], [0, 4, 6]], jnp.int32)
PAGES, SLOTS = 7, 4
# Each a program of one piece: one by one, their operations take three times as long to compile.
read, written = compiled(cache.read), compiled(cache.written)


def latents(seed: int, tokens: int) -> Cache:
    return Cache(normal(seed, 2, tokens, 160), normal(seed + 1, 2, tokens, CFG.rope_dim))


def filled(fp8: bool) -> tuple[Pool, Cache]:
    """A pool with 10 tokens of two rows, written in two goes, and what was written."""
    pool = compiled(lambda: empty_pool(CFG, PAGES, SLOTS, jnp.float32, fp8))()
    own = latents(0, 10)
    position_BT = jnp.arange(10)[None] + jnp.zeros((2, 1), jnp.int32)
    for part in (slice(0, 3), slice(3, 10)):
        there_BT = position_BT[:, part]
        pool = written(
            pool,
            jax.tree.map(lambda x, part=part: x[:, part], own),
            TABLE_BY,
            there_BT,
            jnp.ones_like(there_BT, bool),
        )
    return pool, own


@pytest.mark.parametrize("fp8", [False, True], ids=["as is", "fp8"])
def test_rows_read_their_own_latents_in_order_and_zeros_behind_them(fp8: bool):
    pool, own = filled(fp8)
    before_B = jnp.asarray([10, 7])
    found = read(pool, TABLE_BY, before_B)
    expected = compiled(as_read)(own, pool)
    for x, wanted in zip(map(np.asarray, found), map(np.asarray, expected), strict=True):
        assert x.shape[1] == 3 * SLOTS
        for row, before in enumerate(before_B.tolist()):
            assert np.array_equal(x[row, :before], wanted[row, :before])
            assert not x[row, before:].any()


def test_a_chunk_is_attended_to_as_it_will_be_read_later_and_fp8_is_near():
    pool, own = filled(fp8=True)
    rounded = compiled(as_read)(own, pool)
    near, exact = np.asarray(rounded.c_kv_BSC), np.asarray(own.c_kv_BSC)
    error = np.abs(near - exact).max() / np.abs(exact).max()
    assert 1e-3 < error < 2**-4  # three bits of mantissa
    assert np.array_equal(rounded.k_rope_BSR, own.k_rope_BSR)
    assert as_read(own, filled(fp8=False)[0]) is own


def test_v3s_fp8_cache_takes_656_bytes_a_token_and_layer():
    v3 = replace(TINY, kv_latent=512, rope_dim=64)
    for fp8, size in ((False, 1152), (True, 656)):
        pool = jax.eval_shape(lambda fp8=fp8: empty_pool(v3, 2, 8, jnp.bfloat16, fp8))
        assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pool)) / 16 == size


def test_what_is_not_live_is_not_written_and_nan_in_a_page_stays_where_it_is():
    pool, _ = filled(fp8=False)
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), latents(9, 2))
    position_BT, live_BT = (
        jnp.asarray([[8, 9], [8, 99]]),
        jnp.asarray([[False, True], [True, False]]),
    )
    after = written(pool, bad, TABLE_BY, position_BT, live_BT)
    changed = np.argwhere(np.isnan(np.asarray(after.c_kv_YZC)).any(-1)).tolist()
    assert changed == [[3, 1], [6, 0]]  # token 9 of row 0, token 8 of row 1
    found = read(after, TABLE_BY, jnp.asarray([9, 8]))
    assert np.isfinite(found.c_kv_BSC).all()
    assert np.isfinite(found.k_rope_BSR).all()
