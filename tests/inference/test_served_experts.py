"""Experts as served are the model's, whatever is padding and wherever copies lie."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import MeshConfig
from dsv3_jax.inference.expert_slots import slots_of
from dsv3_jax.inference.served_experts import (
    Placement,
    make_serving_plan,
    physical,
    served_experts,
)
from dsv3_jax.model.moe import MoE
from dsv3_jax.parallel.buckets import make_exchange_plan
from dsv3_jax.parallel.mesh import TOKEN_AXES, make_mesh
from tests.inference.served import in_fp8, spread_layer
from tests.parallel.exchanges import placed
from tests.shapes import compiled, normal, random_part, tiny_model
from tests.tolerances import FLOAT64, assert_close

E, SHARED, K, D = 16, 2, 2, 8
CFG = replace(
    tiny_model(num_experts=E, experts_per_token=K, num_shared_experts=SHARED, num_groups=4),
    d_model=D,
    expert_hidden=6,
)
MESHES = {"2x4": (1, 2, 4), "1x8": (1, 1, 8), "2 of 2x2": (2, 2, 2)}  # data, node, local
ROWS, LENGTH = 8, 10


@cache
def model() -> MoE:
    """Made in float64 by the first test that asks."""
    return random_part(MoE, CFG, jnp.float64)


def batch(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """x [B, T, D] with NaN where it is not valid, and valid [B, T]: among its rows a full one, an
    empty one and one of which every other is padding.
    """
    valid_BT = np.random.default_rng(seed).random((ROWS, LENGTH)) < 0.7
    valid_BT[0], valid_BT[1], valid_BT[2] = True, False, np.arange(LENGTH) % 2 == 0
    x_BTD = normal(seed, ROWS, LENGTH, D)
    return jnp.where(valid_BT[..., None], x_BTD, jnp.nan), jnp.asarray(valid_BT)


@cache
def wanted() -> tuple[jax.Array, jax.Array]:
    """The model's own, of the same tokens; zeros in padding. [B, T, D] and the load [E]."""
    x_BTD, valid_BT = batch()
    x_BTD = jnp.where(valid_BT[..., None], x_BTD, 0)
    y_BTD, stats = compiled(lambda moe, x, valid: moe(x, valid))(model(), x_BTD, valid_BT)
    return jnp.where(valid_BT[..., None], y_BTD, 0), stats.load_E


def random_slots(seed: int, experts: int, slots: int) -> np.ndarray:
    """[P], every expert at least once; some have many copies."""
    draw = np.random.default_rng(seed)
    share_E = np.exp(2 * draw.standard_normal(experts))
    more = draw.choice(experts, slots - experts, p=share_E / share_E.sum())
    return draw.permutation(np.concatenate([np.arange(experts), more]))


def placement_of(physical_to_logical_P: np.ndarray, experts: int) -> Placement:
    most = len(physical_to_logical_P) - experts + 1
    physical_EC = np.full((experts, most), -1, np.int32)
    for expert in range(experts):
        found = np.flatnonzero(physical_to_logical_P == expert)
        physical_EC[expert, : len(found)] = found
    return Placement(physical_EC, (physical_EC >= 0).sum(1, dtype=np.int32))


def check(y_BTD: jax.Array, load_E: jax.Array, *, shared_as_routed: bool) -> None:
    """Equal where tokens are; padding is NaN where it was and all of it is shared, else 0."""
    (_, valid_BT), (wanted_BTD, wanted_E) = batch(), wanted()
    assert_close(jnp.where(valid_BT[..., None], y_BTD, 0), wanted_BTD, FLOAT64)
    padding = np.asarray(y_BTD)[~np.asarray(valid_BT)]
    assert (padding == 0).all() if shared_as_routed else np.isnan(padding).all()
    every = [int(valid_BT.sum())] * SHARED * shared_as_routed
    assert load_E.tolist() == [*wanted_E.tolist(), *every]


# --- one device -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "shared"),
    [
        (0, True),
        pytest.param(None, False, marks=pytest.mark.slow),
        pytest.param(0, False, marks=pytest.mark.slow),
        pytest.param(None, True, marks=pytest.mark.slow),
    ],
)
def test_one_device_serves_the_model(x64, seed: int | None, shared: bool):
    experts, placement = E + SHARED * shared, None
    slots_P = np.arange(experts) if seed is None else random_slots(seed, experts, experts + 6)
    if seed is not None:
        placement = placement_of(slots_P, experts)
    moe = slots_of(model(), slots_P, shared_as_routed=shared)
    layer = partial(served_experts, shared_as_routed=shared)
    y_BTD, load_E = compiled(lambda *args: layer(*args[:3], None, *args[3:]))(
        moe, *batch(), placement
    )
    check(y_BTD, load_E, shared_as_routed=shared)


@pytest.mark.slow
def test_experts_in_fp8_are_served_as_the_model_computes_them(x64):
    """Routed shared ones too; experts of 6 columns, so each is in one block."""
    moe = in_fp8(random_part(MoE, replace(CFG, num_shared_experts=1), jnp.float64))
    x_BTD, valid_BT = normal(1, 2, 3, D), jnp.ones((2, 3), bool)
    slots_P = random_slots(5, E + 1, 24)
    served = slots_of(moe, slots_P, shared_as_routed=True)
    placement = jax.tree.map(jnp.asarray, placement_of(slots_P, E + 1))

    def both(moe, served):
        y_BTD, _ = served_experts(served, x_BTD, valid_BT, None, placement, True)
        return y_BTD, moe(x_BTD, valid_BT)[0]

    assert_close(*compiled(both)(moe, served), FLOAT64)


# --- a mesh ---------------------------------------------------------------------------------------


@cache
def program(name: str, slots: int, shared: bool):
    """The mesh, and compiled `f(moe, x, valid, placement) -> y, loads [devices, E]`, its arguments
    put in their places.
    """
    cfg = MeshConfig(1, *MESHES[name], bucket_factor=0.5)
    mesh = make_mesh(cfg)
    plan = make_serving_plan(cfg, CFG, slots, shared_as_routed=shared)
    rows = P(TOKEN_AXES)

    def body(moe, x_BTD, valid_BT, placement):
        y_BTD, load_E = served_experts(moe, x_BTD, valid_BT, plan, placement, shared)
        return y_BTD, load_E[None]

    # Where arguments lie is part of their types.
    run = compiled(jax.shard_map(body, mesh=mesh, out_specs=(rows, rows)))

    def on_mesh(moe, x_BTD, valid_BT, placement):
        others = x_BTD, valid_BT, placement
        return run(moe, *placed(mesh, (rows, rows, jax.tree.map(lambda _: P(), placement)), others))

    return mesh, on_mesh


MESH_CASES = [
    ("2x4", 0, True),
    pytest.param("2x4", None, False, marks=pytest.mark.slow),
    pytest.param("1x8", 1, False, marks=pytest.mark.slow),
    pytest.param("1x8", None, False, marks=pytest.mark.exhaustive),
    pytest.param("2x4", 1, False, marks=pytest.mark.exhaustive),
    pytest.param("1x8", 0, True, marks=pytest.mark.exhaustive),
    pytest.param("2 of 2x2", 0, True, marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize(("name", "seed", "shared"), MESH_CASES)
def test_a_mesh_serves_the_model(x64, name: str, seed: int | None, shared: bool):
    experts = E + SHARED * shared
    slots_P = np.arange(E) if seed is None else random_slots(seed, experts, 32)
    placement = None if seed is None else placement_of(slots_P, experts)
    mesh, run = program(name, len(slots_P), shared)
    moe = spread_layer(slots_of(model(), slots_P, shared_as_routed=shared), mesh)
    y_BTD, load_DE = run(moe, *batch(), placement)
    check(y_BTD, load_DE.sum(0), shared_as_routed=shared)


def test_another_placement_is_the_same_program(x64):
    mesh, run = program("2x4", 32, True)
    for seed in (0, 2, 3):
        slots_P = random_slots(seed, E + SHARED, 32)
        moe = spread_layer(slots_of(model(), slots_P, shared_as_routed=True), mesh)
        y_BTD, load_DE = run(moe, *batch(), placement_of(slots_P, E + SHARED))
        check(y_BTD, load_DE.sum(0), shared_as_routed=True)


# --- copies, nodes --------------------------------------------------------------------------------


def test_copies_take_turns():
    """To one token more or less, and though all but every n-th row is padding."""
    slots_P = random_slots(4, E, 40)
    placement = placement_of(slots_P, E)
    experts_TK = np.tile(np.arange(E, dtype=np.int32), (60, 1))
    for every in (1, 2, 3):
        valid_T = np.arange(60) % every == 0
        slots_TK = np.asarray(turns(experts_TK, valid_T, placement, 5))
        np.testing.assert_array_equal(slots_P[slots_TK[valid_T]], experts_TK[valid_T])
        taken_P = np.bincount(slots_TK[valid_T].reshape(-1), minlength=40)
        for expert in range(E):
            taken = taken_P[slots_P == expert]
            assert taken.max() - taken.min() <= 1


turns = compiled(physical)


def test_devices_begin_with_different_copies():
    """Where each has but one token, as while decoding."""
    placement = Placement(np.arange(8)[None], np.full(1, 8))
    one, valid_T = np.zeros((1, 1), np.int32), np.ones(1, bool)
    slots = {int(turns(one, valid_T, placement, device)[0, 0]) for device in range(8)}
    assert slots == set(range(8))


def test_plans_have_room_for_the_nodes_that_copies_may_lie_on():
    """Kept groups bound them where a group's copies share its node, and nowhere else."""
    mesh, cfg = MeshConfig(1, 1, 4, 2), replace(CFG, num_kept_groups=1)
    own = make_exchange_plan(mesh, cfg)
    assert make_serving_plan(mesh, cfg, E, grouped=True) == own
    assert own.nodes_per_token == 1
    assert make_serving_plan(mesh, cfg, 24) == replace(own, num_experts=24, nodes_per_token=K)
    shared = make_serving_plan(mesh, cfg, 24, shared_as_routed=True)
    assert shared.nodes_per_token == K + 2
    assert make_serving_plan(MeshConfig(), cfg, 19) is None
    with pytest.raises(ValueError, match=r"experts are 20; allowed: multiples of the 8 devices"):
        make_serving_plan(mesh, cfg, 20)
