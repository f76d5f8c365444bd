"""One layer: its residual form; what each rematerialisation policy computes and keeps."""

from collections import Counter
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.block import Block, Remat, rematerialised
from dsv3_jax.model.layers import Init, rms_norm
from dsv3_jax.model.yarn import rope_table
from tests.shapes import compiled, normal, random_module, random_part, tiny_model
from tests.tolerances import FLOAT64, assert_close

B, T = 2, 23
VALID = np.ones((B, T), bool)
# All widths differ, sums and products of heads included: a shape tells what a residual is.
CFG = tiny_model(
    d_model=31,
    num_heads=3,
    q_latent=20,
    kv_latent=13,
    nope_dim=10,
    rope_dim=4,
    v_dim=7,
    dense_hidden=41,
    expert_hidden=19,
    num_shared_experts=2,
)


def layer_of(cfg: ModelConfig, dtype, remat: Remat = "none"):
    """`layer(x, block) -> (x, stats)`, as the model scans it."""
    rope = rope_table(cfg, jnp.arange(T)[None], dtype)
    return rematerialised(lambda x, block: block(x, rope, jnp.asarray(VALID)), remat, scanned=True)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "experts"])
def test_a_layer_adds_attention_and_feed_forward_of_the_normed_stream(
    x64, strict_dtypes, moe: bool
):
    block, x = random_part(Block, CFG, jnp.float64, moe=moe), normal(0, B, T, CFG.d_model)

    def expected(x):
        rope = rope_table(CFG, jnp.arange(T)[None], x.dtype)
        x = x + block.mla(rms_norm(x, block.attention_norm_D[...], CFG.rms_eps), rope)
        normed = rms_norm(x, block.ffn_norm_D[...], CFG.rms_eps)
        if not moe:
            return x + block.dense(normed), None
        y, stats = block.moe(normed, jnp.asarray(VALID))
        return x + y, stats

    actual = compiled(layer_of(CFG, x.dtype))(x, block)
    assert_close(actual, compiled(expected)(x), FLOAT64)


@cache
def scanned_gradients(moe: bool, remat: Remat) -> tuple:
    """Objective and gradients of two scanned layers, balance loss included."""
    init = Init(jax.random.key(0), CFG.init_std, jnp.dtype(jnp.float64))

    def build(layer: jax.Array) -> Block:
        return Block(CFG, moe=moe, init=init.layer(layer))

    blocks = random_module(lambda: jax.vmap(build)(jnp.arange(2)))
    x, weight = normal(0, B, T, CFG.d_model), normal(1, B, T, CFG.d_model)

    def objective(blocks, x):
        y, stats = lax.scan(layer_of(CFG, x.dtype, remat), x, blocks)
        return (y * weight).sum() + (stats.balance.sum() if moe else 0)

    return compiled(jax.value_and_grad(objective, (0, 1)))(blocks, x)


@pytest.mark.parametrize(
    ("moe", "remat"),
    [
        (True, "report"),
        pytest.param(False, "report", marks=pytest.mark.slow),
        pytest.param(False, "full", marks=pytest.mark.slow),
        pytest.param(True, "full", marks=pytest.mark.slow),
    ],
)
def test_recomputation_changes_no_value_and_no_gradient(x64, strict_dtypes, moe, remat):
    assert_close(scanned_gradients(moe, remat), scanned_gradients(moe, "none"), FLOAT64)


def kept(moe: bool, remat: Remat) -> Counter:
    """Shapes of what the backward pass keeps of bfloat16 activations, weights left out."""
    block = jax.eval_shape(lambda: random_part(Block, CFG, moe=moe))
    layer = layer_of(CFG, jnp.bfloat16, remat)
    x = jax.ShapeDtypeStruct((B, T, CFG.d_model), jnp.bfloat16)
    residuals = jax.eval_shape(
        lambda x, block: jax.vjp(lambda *a: layer(*a)[0], x, block)[1], x, block
    )
    weights = {w.shape for w in jax.tree.leaves(block)}
    leaves = [leaf for leaf in jax.tree.leaves(residuals) if leaf.shape not in weights]
    return Counter((leaf.shape, leaf.dtype.name) for leaf in leaves)


def bytes_of(shapes: Counter) -> int:
    sizes = (np.prod(s, dtype=int) * jnp.dtype(d).itemsize * n for (s, d), n in shapes.items())
    return int(sum(sizes))


ATTENTION_KEEPS = Counter(
    {
        ((B, T, 31), "bfloat16"): 2,  # the stream into attention and into the feed-forward
        ((B, T, 20), "bfloat16"): 1,  # query latent, before its norm
        ((B, T, 17), "bfloat16"): 1,  # key-value latent and rotary key, before norm and rotation
        ((B, T, 3, 7), "bfloat16"): 1,  # attention's output
        ((B, 3, T), "float32"): 1,  # its log-sum-exp
        ((1, T, 4), "float32"): 1,  # cos and sin of the positions, not per layer
    }
)
# Missing: what the norms return (31, 20, 13), and the up-projections (3 x 14, 3 x 17, 3 x 7).


def test_the_report_policy_keeps_no_norm_and_no_up_projection_of_a_dense_layer():
    gate_and_up = Counter({((B, T, 2 * 41), "bfloat16"): 1})
    assert kept(False, "report") == ATTENTION_KEEPS + gate_and_up


def test_the_report_policy_keeps_no_norm_and_no_up_projection_of_an_expert_layer():
    """Of the experts it keeps scores, choice, layout, gate and up products: not what was
    dispatched, nor what the down-projection returned.
    """
    rows, blocks = 8, (92 + 8 * 7) // 8
    experts = Counter(
        {
            ((B, T, 2 * 38), "bfloat16"): 1,  # gate and up of the shared expert
            ((B, T, 8), "float32"): 1,  # scores and choice of the router
            ((B, T, 2), "int32"): 1,
            ((rows * blocks, 2 * 19), "bfloat16"): 1,
            ((B * T, 2), "int32"): 1,
            ((rows * blocks,), "int32"): 1,
            ((blocks,), "int32"): 1,
        }
    )
    assert kept(True, "report") == ATTENTION_KEEPS + experts


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "experts"])
def test_full_keeps_the_input_alone_and_each_policy_less_than_the_one_before(moe: bool):
    full = Counter({((B, T, 31), "bfloat16"): 1, ((1, T, 4), "float32"): 1})
    assert kept(moe, "full") == full
    none, report = bytes_of(kept(moe, "none")), bytes_of(kept(moe, "report"))
    assert bytes_of(full) * 5 < report < none / 2
    # In float32 the router's input alone: norms keep what came in.
    assert kept(moe, "none")[(B, T, 31), "float32"] == moe
