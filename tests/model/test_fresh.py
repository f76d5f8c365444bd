"""Weights drawn together are those that a model draws one by one, bit for bit, where both are
compiled alike.
"""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import fresh as module
from dsv3_jax.model.fresh import fresh
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.parallel.stages import Cut
from tests.shapes import compiled, tiny_model

slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive


def check(cfg: ModelConfig, dtype=jnp.float32, cut: Cut | None = None) -> None:
    """The same structure, and the same bits."""
    key = jax.random.key(3)
    build = compiled(
        lambda key: (
            fresh(cfg, key, dtype, cut),
            DeepSeekV3(cfg, rngs=nnx.Rngs(key), dtype=dtype, cut=cut),
        )
    )
    together, alone = map(nnx.state, build(key))
    assert jax.tree.structure(together) == jax.tree.structure(alone)
    unequal = jax.tree.map(lambda a, b: bool((a != b).any()) or a.dtype != b.dtype, together, alone)
    assert not any(jax.tree.leaves(unequal)), unequal


def test_loops_and_single_draws_give_a_models_own_weights(monkeypatch):
    monkeypatch.setattr(module, "SHORTEST", 256)
    monkeypatch.setattr(module, "LONGEST", 2_000)  # experts of a layer have 3,072 numbers
    check(tiny_model(num_layers=2, mtp_depth=0))


@slow
def test_of_all_kinds_of_modules():
    check(tiny_model(mtp_depth=2, tied_head=True))


@exhaustive
@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 4},
        {"num_dense_layers": 0, "mtp_depth": 0, "q_latent": None},
        {"num_dense_layers": 3, "num_shared_experts": 0},
    ],
)
def test_other_models(changes):
    check(tiny_model(**changes))


@slow
def test_older_random_numbers():
    with jax.threefry_partitionable(False):
        check(tiny_model(num_layers=2, mtp_depth=0))


@exhaustive
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_other_dtypes(x64, dtype):
    check(tiny_model(mtp_depth=0), dtype)


@slow
@pytest.mark.parametrize(
    "cut",
    [
        Cut(0, 1, embed=True, head=False, first_mtp=0, end_mtp=0),
        Cut(1, 3, embed=False, head=True, first_mtp=0, end_mtp=0),
        Cut(3, 3, embed=False, head=True, first_mtp=0, end_mtp=1),
    ],
)
def test_stages(cut):
    check(tiny_model(), cut=cut)
