"""AdamW as the report trains with it: both moments in bfloat16, arithmetic and masters in float32
(report 3.3.3, 4.2).
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from dsv3_jax.config import OptimizerConfig


class AdamState(NamedTuple):
    """Updates done so far (int32), first and second moments in the stored dtype."""

    count: chex.Array
    mu: chex.ArrayTree
    nu: chex.ArrayTree


def adamw(cfg: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm, Adam, decoupled decay.

    Updates come for a learning rate of 1: scale them by -lr.
    """
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        scale_by_adam(cfg.b1, cfg.b2, cfg.eps, jnp.dtype(cfg.moment_dtype)),
        optax.add_decayed_weights(cfg.weight_decay, mask=decays),
    )


def scale_by_adam(
    b1: float, b2: float, eps: float, moment_dtype: jnp.dtype
) -> optax.GradientTransformation:
    """Adam's direction.

    Moments are widened, moved and rounded once; optax narrows only the first.
    """

    def init(params: chex.ArrayTree) -> AdamState:
        zeros = [jax.tree.map(lambda p: jnp.zeros(p.shape, moment_dtype), params) for _ in "mv"]
        return AdamState(jnp.zeros((), jnp.int32), *zeros)

    def update(
        grads: chex.ArrayTree, state: AdamState, params: chex.ArrayTree | None = None
    ) -> tuple[chex.ArrayTree, AdamState]:
        del params
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: _moved(m, g, b1), state.mu, grads)
        nu = jax.tree.map(lambda n, g: _moved(n, g * g, b2), state.nu, grads)
        updates = jax.tree.map(
            lambda m, n: _unbiased(m, b1, count) / (jnp.sqrt(_unbiased(n, b2, count)) + eps), mu, nu
        )
        mu, nu = (jax.tree.map(lambda x: x.astype(moment_dtype), tree) for tree in (mu, nu))
        return updates, AdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _moved(old: jax.Array, new: jax.Array, decay: float) -> jax.Array:
    """The moving average in the dtype of the new value."""
    return decay * old.astype(new.dtype) + (1 - decay) * new


def _unbiased(moment: jax.Array, decay: float, count: jax.Array) -> jax.Array:
    return moment / (1 - decay ** count.astype(moment.dtype))


def decays(params: chex.ArrayTree) -> chex.ArrayTree:
    """True for every parameter under weight decay: all but the gains of norms."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "norm" not in jax.tree_util.keystr(path), params
    )
