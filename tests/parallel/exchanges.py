"""Expert parallelism on emulated devices, its slow twin, and routings that are hard on it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import MeshConfig
from dsv3_jax.model.moe import Weights, experts
from dsv3_jax.parallel.buckets import ExchangePlan
from dsv3_jax.parallel.dispatch import Traffic, exchange
from dsv3_jax.parallel.mesh import EXPERT_AXES, TOKEN_AXES, make_mesh, varying
from dsv3_jax.parallel.wire import PLAIN, Wire
from dsv3_jax.quant.gemm import linear
from dsv3_jax.quant.swiglu import swiglu
from dsv3_jax.quant.wide import wide
from tests.shapes import compiled

D, F, E, K = 8, 6, 16, 3
MESHES = {
    "1x1x8": (1, 1, 8),
    "1x2x4": (1, 2, 4),
    "2x2x2": (2, 2, 2),
    "1x4x2": (1, 4, 2),
    "4x1x2": (4, 1, 2),
    "1x8x1": (1, 8, 1),
    "1x2x2": (1, 2, 2),
}
SPECS = P(TOKEN_AXES), P(TOKEN_AXES), P(TOKEN_AXES), P(EXPERT_AXES)


def mesh_of(shape: tuple[int, int, int], **others: Any) -> tuple[MeshConfig, Mesh]:
    """data x node x local."""
    cfg = MeshConfig(1, *shape, **others)
    return cfg, make_mesh(cfg)


def on_mesh(mesh: Mesh, layer: Callable) -> Callable[..., tuple[tuple[jax.Array, Any], tuple]]:
    """Compiled `f(x_TD, experts_TK, gates_TK, weights, dy_TD) -> (y, traffic), gradients`."""

    def body(x_TD, experts_TK, gates_TK, weights, dy_TD):
        weights = varying(weights, TOKEN_AXES)
        call = partial(layer, experts_TK=experts_TK)
        y_TD, pull, traffic = jax.vjp(
            lambda x, g, w: call(x, gates_TK=g, weights=w), x_TD, gates_TK, weights, has_aux=True
        )
        dx_TD, dgates_TK, dweights = pull(dy_TD)
        dweights = lax.psum(dweights, "data")
        return (y_TD, jax.tree.map(lambda n: n[None], traffic)), (dx_TD, dgates_TK, dweights)

    tokens = P(TOKEN_AXES)
    specs = (*SPECS, tokens), ((tokens, tokens), (tokens, tokens, P(EXPERT_AXES)))
    program = compiled(jax.shard_map(body, mesh=mesh, in_specs=specs[0], out_specs=specs[1]))
    return OnMesh(program, mesh, specs[0])


class OnMesh(NamedTuple):
    """A program whose arguments are put in their places first."""

    program: Callable
    mesh: Mesh
    specs: tuple

    def __call__(self, *args: Any) -> Any:
        return self.program(*placed(self.mesh, self.specs, args))

    def lower(self, *args: Any) -> Any:
        return self.program.lower(*placed(self.mesh, self.specs, args))


def placed(mesh: Mesh, specs: tuple, args: tuple) -> tuple:
    """Arrays where a program on the mesh expects them."""
    return jax.device_put(args, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))


def fast(plan: ExchangePlan, wire: Wire = PLAIN) -> Callable[..., tuple[jax.Array, Traffic]]:
    """The exchange with this repository's experts."""
    apply = partial(experts, complete=False)

    def layer(x_TD, experts_TK, gates_TK, weights):
        return exchange(plan, wire, apply, x_TD, experts_TK, gates_TK, weights)

    return layer


def dense(x_TD, experts_TK, gates_TK, weights: Weights) -> tuple[jax.Array, tuple]:
    """The same sum without an exchange: every device of a group gathers all tokens, its experts
    compute all of them, and results are summed over devices.
    """
    here = lax.axis_index(EXPERT_AXES) * weights.gate.shape[0]
    x_TD, experts_TK, gates_TK = (
        lax.all_gather(x, EXPERT_AXES, tiled=True) for x in (x_TD, experts_TK, gates_TK)
    )
    y_TD = one_by_one(x_TD, experts_TK - here, gates_TK, weights)
    return lax.psum_scatter(y_TD, EXPERT_AXES, tiled=True), ()


def one_by_one(x_TD, experts_TK, gates_TK, weights: Weights) -> jax.Array:
    """Every expert computes every token."""
    y_TD = jnp.zeros(x_TD.shape, wide(x_TD.dtype))
    for e in range(weights.gate.shape[0]):
        gate_up_T_FF = linear(x_TD, weights.gate[e], weights.up[e])
        gate_T = jnp.where(experts_TK == e, gates_TK, 0).sum(-1)
        y_TD += linear(gate_up_T_FF, weights.down[e], activation=swiglu) * gate_T[:, None]
    return y_TD.astype(x_TD.dtype)


# --- routings: (draw, tokens) -> experts [T, K] --------------------------------------------------


def uniform(draw: np.random.Generator, tokens: int) -> np.ndarray:
    return np.stack([draw.choice(E, K, replace=False) for _ in range(tokens)])


def one_expert(draw: np.random.Generator, tokens: int) -> np.ndarray:
    """All to expert 5, and to two more of its device's neighbours."""
    return np.stack([draw.permutation([5, 4, 3]) for _ in range(tokens)])


def one_node(draw: np.random.Generator, tokens: int) -> np.ndarray:
    """All to the last experts: one device of eight, or one node."""
    return np.stack([E - 1 - draw.choice(K + 1, K, replace=False) for _ in range(tokens)])


def idle_expert(draw: np.random.Generator, tokens: int) -> np.ndarray:
    return np.stack([1 + draw.choice(E - 1, K, replace=False) for _ in range(tokens)])


def lognormal(draw: np.random.Generator, tokens: int) -> np.ndarray:
    """Shares of experts as uneven as e^(2 z)."""
    share_E = np.exp(2 * draw.standard_normal(E))
    return np.stack(
        [draw.choice(E, K, replace=False, p=share_E / share_E.sum()) for _ in range(tokens)]
    )


ROUTINGS = (uniform, one_expert, one_node, idle_expert, lognormal)


def case(routing: Callable, tokens: int, dtype: Any = jnp.float64, seed: int = 0) -> tuple:
    """x [T, D], experts [T, K], gates [T, K], weights, dy [T, D], as NumPy arrays."""
    draw = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape).astype(dtype)

    weights = Weights(normal(E, D, F), normal(E, D, F), normal(E, F, D))
    experts_TK = routing(draw, tokens).astype(np.int32)
    return normal(tokens, D), experts_TK, normal(tokens, K), weights, normal(tokens, D)
