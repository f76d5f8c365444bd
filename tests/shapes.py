"""One tiny model for all tests: its sizes, random weights without a compilation, and a quick jit.

Every size is small, and sizes that could be mistaken for one another differ. To build a model,
`DeepSeekV3(cfg, rngs=...)` compiles some forty random draws, many seconds of work; here the
structure comes from `jax.eval_shape` and the numbers from NumPy.
"""

import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.config import ModelConfig, YarnConfig
from dsv3_jax.model.layers import Init
from dsv3_jax.model.router import RouterBias
from dsv3_jax.model.transformer import DeepSeekV3

Module = TypeVar("Module", bound=nnx.Module)

TINY = ModelConfig(
    vocab_size=64,
    d_model=32,
    num_layers=3,
    num_dense_layers=1,
    num_heads=2,
    q_latent=24,
    kv_latent=16,
    nope_dim=8,
    rope_dim=4,
    v_dim=6,
    dense_hidden=40,
    expert_hidden=12,
    num_experts=8,
    experts_per_token=2,
    num_groups=4,
    num_kept_groups=2,
    mtp_depth=1,
    max_length=64,
    init_std=0.2,  # about 1 / sqrt(32): signals stay near 1 through every layer
)
# Active: beyond 16 positions, of which the tiny model allows 64.
TINY_YARN = YarnConfig(factor=4.0, beta_fast=2.0, beta_slow=0.5, original_length=16)

# Test programs run a few times on small arrays: making fast code costs more than it saves. These
# options nearly halve the compilation of a model's gradient. Not for use under another jit.
FAST_COMPILATION = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
if jax.__version_info__ < (0, 11):
    # XLA's older generator of loops takes 40 % of the new one's time; it has gone since, so that
    # the second interpreter's tests compile with the one of today.
    FAST_COMPILATION["xla_cpu_use_fusion_emitters"] = False
compiled: Callable = partial(jax.jit, compiler_options=FAST_COMPILATION)


def tiny_model(**changes: Any) -> ModelConfig:
    """The tiny config with some fields changed."""
    return replace(TINY, **changes)


def random_model(cfg: ModelConfig, dtype: Any = jnp.float32, seed: int = 0) -> DeepSeekV3:
    """A model with random weights, gains and biases."""
    return random_module(lambda: DeepSeekV3(cfg, rngs=nnx.Rngs(0), dtype=dtype), cfg.init_std, seed)


def random_part(
    build: Callable[..., Module], cfg: ModelConfig, dtype: Any = jnp.float32, **kwargs: Any
) -> Module:
    """`build(cfg, init=..., **kwargs)` (MLA, MoE, Block) with random weights, gains and biases."""

    def make() -> Module:
        return build(cfg, init=Init(jax.random.key(0), cfg.init_std, jnp.dtype(dtype)), **kwargs)

    return random_module(make, cfg.init_std)


def random_module(build: Callable[[], Module], std: float = 0.2, seed: int = 0) -> Module:
    """What `build` returns, with NumPy's numbers: weights N(0, std^2), gains near 1, biases near 0.

    Gains that are not 1 and biases that are not 0 show whether they are used, and where. A
    tensor's numbers depend on its path and the seed alone: models of different dtypes share them.
    """

    def variable(path: tuple, abstract: nnx.Variable) -> nnx.Variable:
        name = ".".join(map(str, path))
        draw = np.random.default_rng([seed, zlib.crc32(name.encode())])
        noise = draw.standard_normal(abstract.shape)
        if isinstance(abstract, RouterBias):
            values = 0.05 * noise
        else:
            values = 1 + 0.2 * noise if "norm" in name else std * noise
        return abstract.replace(in_dtype(values, abstract.dtype))

    graphdef, state = nnx.split(jax.eval_shape(build))
    return nnx.merge(graphdef, nnx.map_state(variable, state))


def normal(seed: int, *shape: int, dtype: Any = None) -> jax.Array:
    """Standard normal numbers of NumPy; by default float64 under x64, else float32."""
    return in_dtype(np.random.default_rng(seed).standard_normal(shape), dtype)


def in_dtype(values: np.ndarray, dtype: Any) -> jax.Array:
    """Cast as `jnp.asarray(values, dtype)` casts, in NumPy: JAX compiles that for each shape."""
    values = values.astype(jax.dtypes.canonicalize_dtype(values.dtype))
    return jnp.asarray(values if dtype is None else values.astype(jnp.dtype(dtype)))


def random_tokens(cfg: ModelConfig, rows: int, length: int, seed: int = 0) -> jax.Array:
    """int32 [rows, length]."""
    draw = np.random.default_rng(seed)
    return jnp.asarray(draw.integers(0, cfg.vocab_size, (rows, length)), jnp.int32)
