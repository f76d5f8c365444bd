"""AdamW: optax's numbers, one rounding of bfloat16 moments, who decays, clipping."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dsv3_jax.config import OptimizerConfig, ParamGroup
from dsv3_jax.train.optimizer import AdamState, adamw, check_groups, decays, scale_by_adam
from tests.shapes import normal, random_model, tiny_model
from tests.tolerances import FLOAT32, assert_close

B1, B2, EPS = 0.9, 0.95, 1e-8
STEPS = 5


def gradients(step: int) -> dict[str, jax.Array]:
    """Of two tensors, whose sizes differ by many orders of magnitude."""
    return {"w": normal(step, 3, 4), "v": 1e-6 * normal(10 + step, 5)}


def updates_of(cfg: OptimizerConfig, grads: dict, params: dict) -> dict:
    """Of the first step."""
    transform = adamw(cfg)
    norm = optax.tree.norm(grads)
    return transform.update(grads, transform.init(params), params, norm=norm)[0]


def test_with_float32_moments_it_is_optax_adam():
    ours, theirs = scale_by_adam(B1, B2, EPS, jnp.float32), optax.scale_by_adam(B1, B2, EPS)
    state, reference = ours.init(gradients(0)), theirs.init(gradients(0))
    for step in range(STEPS):
        updates, state = ours.update(gradients(step), state)
        expected, reference = theirs.update(gradients(step), reference)
        assert_close(updates, expected, FLOAT32)
        assert_close((state.mu, state.nu), (reference.mu, reference.nu), FLOAT32)
    assert state.count == STEPS


def test_bfloat16_moments_are_widened_moved_and_rounded_once_per_step():
    """Bit for bit; the update comes from the moments before they are rounded."""
    transform = scale_by_adam(B1, B2, EPS, jnp.bfloat16)
    state = transform.init({"w": gradients(0)["w"]})
    mu, nu = (np.zeros((3, 4), jnp.bfloat16) for _ in "mv")
    for step in range(STEPS):
        g = np.asarray(gradients(step)["w"])
        updates, state = transform.update({"w": jnp.asarray(g)}, state)
        wide_mu = np.float32(B1) * mu.astype(np.float32) + np.float32(1 - B1) * g
        wide_nu = np.float32(B2) * nu.astype(np.float32) + np.float32(1 - B2) * (g * g)
        root = np.sqrt(wide_nu / (1 - B2 ** (step + 1))) + EPS
        assert_close(updates["w"], wide_mu / (1 - B1 ** (step + 1)) / root, FLOAT32)
        mu, nu = wide_mu.astype(jnp.bfloat16), wide_nu.astype(jnp.bfloat16)
        assert state.mu["w"].dtype == state.nu["w"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(state.mu["w"], mu)
        np.testing.assert_array_equal(state.nu["w"], nu)


@pytest.mark.parametrize(("norm", "expected"), [(50.0, 2.0), (1.5, 1.5)])
def test_gradients_are_clipped_to_the_stated_global_norm(norm: float, expected: float):
    """With b1 = b2 = 0 and a huge eps, the update is the clipped gradient over eps."""
    cfg = OptimizerConfig(
        b1=0.0, b2=0.0, eps=1e6, weight_decay=0.0, clip_norm=2.0, moment_dtype="float32"
    )
    grads = gradients(0)
    scale = norm / np.sqrt(sum(np.sum(np.square(g)) for g in grads.values()))
    grads = {name: g * scale for name, g in grads.items()}
    updates = updates_of(cfg, grads, grads)
    clipped = {name: u * 1e6 for name, u in updates.items()}
    assert_close(clipped, {name: g * (expected / norm) for name, g in grads.items()}, FLOAT32)


def abstract_params() -> nnx.State:
    """Of a model with every kind of parameter, two layers of each kind, two MTP modules."""
    cfg = tiny_model(num_layers=4, num_dense_layers=2, mtp_depth=2)
    return nnx.state(jax.eval_shape(lambda: random_model(cfg)), nnx.Param)


def test_everything_decays_but_the_gains_of_norms():
    """A gain has one dimension beside that of stacked layers."""
    params = abstract_params()
    decaying = dict(nnx.to_flat_state(decays(OptimizerConfig(), params)))
    gains = set()
    for path, variable in nnx.to_flat_state(params):
        stacked = path[0] in ("dense_layers", "moe_layers")
        if variable.ndim - stacked == 1:
            gains.add(path)
    assert {path for path, decay in decaying.items() if not decay.get_value()} == gains
    # Two of MLA and two of the block in 2 stacks and 2 MTP modules, three more per module, and
    # one at the model's end.
    assert len(gains) == 4 * 4 + 1 + 2 * 3


def test_groups_scale_the_update_with_its_decay_and_the_first_match_decides():
    groups = (ParamGroup("mla", 0.5), ParamGroup("w_", 3.0, decay=False), ParamGroup("mla.w", 9.0))
    cfg = OptimizerConfig(groups=groups)
    plain = replace(cfg, groups=())
    names = {"mla": {"w_o": 0, "q_norm": 0}, "moe": {"w_up": 0}, "norm_D": 0}
    params = jax.tree.map(lambda _: normal(0, 3, 4), names)
    grads = jax.tree.map(lambda _: 0.01 * normal(1, 3, 4), names)
    updates, expected = (updates_of(c, grads, params) for c in (cfg, plain))
    decay = np.float32(plain.weight_decay) * params["moe"]["w_up"]
    for name in ("w_o", "q_norm"):  # decay stays what it is unless a group says so
        assert_close(updates["mla"][name], 0.5 * expected["mla"][name], FLOAT32)
    assert_close(updates["moe"]["w_up"], 3 * (expected["moe"]["w_up"] - decay), FLOAT32)
    assert_close(updates["norm_D"], expected["norm_D"], FLOAT32)


def test_a_group_that_acts_on_nothing_is_refused_by_name():
    params = abstract_params()
    check_groups(OptimizerConfig(), params)
    for groups in ((ParamGroup("attn"),), (ParamGroup("mla"), ParamGroup("mla.w_o"))):
        with pytest.raises(ValueError, match=rf"optimizer.groups: '{groups[-1].match}' matches no"):
            check_groups(OptimizerConfig(groups=groups), params)


def test_decay_is_decoupled_from_the_gradient():
    cfg = OptimizerConfig(weight_decay=0.1)
    params = {"w": normal(0, 3, 4), "norm_D": normal(1, 4)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = updates_of(cfg, zeros, params)
    expected = {"w": np.float32(0.1) * np.asarray(params["w"]), "norm_D": np.zeros(4, np.float32)}
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_the_state_is_two_moments_of_every_parameter_in_the_stored_dtype():
    params = abstract_params()
    state = jax.eval_shape(adamw(OptimizerConfig()).init, params)
    (adam,) = [part for part in state if isinstance(part, AdamState)]
    for moment in (adam.mu, adam.nu):
        narrowed = jax.tree.map(lambda p: (p.shape, jnp.dtype(jnp.bfloat16)), params)
        assert jax.tree.map(lambda m: (m.shape, m.dtype), moment) == narrowed
    assert len(jax.tree.leaves(state)) == 2 * len(jax.tree.leaves(params)) + 1
