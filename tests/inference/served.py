"""Layers in FP8 and on a mesh, for the tests of served experts."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.model.moe import MoE
from dsv3_jax.parallel.mesh import EXPERT_AXES
from dsv3_jax.quant.fp8 import Blocked, grid

EXPERTS = ("w_gate_EDF", "w_up_EDF", "w_down_EFD")


def low(x) -> Blocked:
    """Some numbers of the weight's shape in 128x128 blocks of E4M3, as published."""
    x = np.asarray(x)
    scales = 1 + np.random.default_rng(x.size).random(grid(x.shape), np.float32)
    return Blocked(jnp.asarray(x.astype(ml_dtypes.float8_e4m3fn)), jnp.asarray(scales))


def in_fp8(moe: MoE, shared: bool = True) -> MoE:
    moe = jax.tree.map(lambda x: x, moe)
    for name in EXPERTS:
        setattr(moe, name, getattr(moe, name).replace(low(getattr(moe, name)[...])))
    for name in ("w_gate_DF", "w_up_DF", "w_down_FD") if shared else ():
        setattr(
            moe.shared, name, getattr(moe.shared, name).replace(low(getattr(moe.shared, name)[...]))
        )
    return moe


def spread(weights: Any, mesh: Mesh) -> Any:
    """Slots over node and local."""
    return jax.device_put(weights, NamedSharding(mesh, P(EXPERT_AXES)))


def spread_layer(moe: MoE, mesh: Mesh) -> MoE:
    """Experts over node and local, all else on every device."""
    placed = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P())), moe)
    for name in EXPERTS:
        weight = getattr(moe, name)
        setattr(placed, name, weight.replace(spread(weight[...], mesh)))
    return placed
