"""AdamW as the report trains with it: both moments in bfloat16, arithmetic and masters in float32
(report 3.3.3, 4.2); groups of parameters may have a learning rate and a decay of their own.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from dsv3_jax.config import OptimizerConfig, ParamGroup
from dsv3_jax.parallel.mesh import parameter_name


class AdamState(NamedTuple):
    """Updates done so far (int32), first and second moments in the stored dtype."""

    count: chex.Array
    mu: chex.ArrayTree
    nu: chex.ArrayTree


def adamw(cfg: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm, Adam, decoupled decay.

    Updates come for a learning rate of 1: scale them by -lr. `update` takes the gradient's global
    `norm` before clipping, a scalar, which a step has summed by part already.
    """
    return optax.chain(
        clip_by_norm(cfg.clip_norm),
        scale_by_adam(cfg.b1, cfg.b2, cfg.eps, jnp.dtype(cfg.moment_dtype)),
        optax.add_decayed_weights(cfg.weight_decay, mask=partial(decays, cfg)),
        optax.stateless(partial(_scaled, cfg)),
    )


def clip_by_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` for a norm that is given."""

    def update(grads, state, params=None, *, norm: jax.Array, **others):
        del params, others
        scale = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


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


def decays(cfg: OptimizerConfig, params: chex.ArrayTree) -> chex.ArrayTree:
    """True for every parameter under weight decay; by default all but the gains of norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: group_of(cfg, path).decay, params)


def _scaled(
    cfg: OptimizerConfig, updates: chex.ArrayTree, params: chex.ArrayTree
) -> chex.ArrayTree:
    """Updates times their groups' learning rates."""
    del params
    return jax.tree_util.tree_map_with_path(
        lambda path, u: u * group_of(cfg, path).learning_rate, updates
    )


def group_of(cfg: OptimizerConfig, path: tuple) -> ParamGroup:
    """The first group whose `match` is in the parameter's name, with its decay decided."""
    name = parameter_name(path)
    group = next((group for group in cfg.groups if group.match in name), ParamGroup(""))
    return replace(group, decay="norm" not in name) if group.decay is None else group


def check_groups(cfg: OptimizerConfig, params: chex.ArrayTree) -> None:
    """ValueError for a group that would act on no parameter."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    used = {group_of(cfg, path).match for path in paths}
    for group in cfg.groups:
        if group.match not in used:
            names = ", ".join(sorted({parameter_name(path) for path in paths})[:3])
            raise ValueError(
                f"optimizer.groups: {group.match!r} matches no parameter that no earlier group "
                f"matches; names are {names}, …"
            )
