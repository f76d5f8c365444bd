"""Weights in physical slots are the experts that tables name, and get there with little memory."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import MeshConfig
from dsv3_jax.inference import expert_slots
from dsv3_jax.inference.expert_slots import moved, moves, slots_of, weights_of
from dsv3_jax.model.moe import MoE, Weights
from dsv3_jax.parallel.mesh import EXPERT_AXES, make_mesh
from dsv3_jax.quant.fp8 import Blocked
from tests.inference.served import in_fp8, low, spread, spread_layer
from tests.shapes import normal, random_part, tiny_model

E, D, F = 16, 8, 12
MESHES = {"2x4": (1, 1, 2, 4), "1x8": (1, 1, 1, 8), "2 of 2x2": (1, 2, 2, 2)}


@cache
def mesh_of(name: str) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(*MESHES[name]))


def logical(kind: str) -> Weights:
    """[E, ...] of every expert, on one device."""
    shapes = ((E, D, F), (E, D, F), (E, F, D))
    arrays = [normal(i, *shape) for i, shape in enumerate(shapes)]
    if kind == "fp8":
        return Weights(*map(low, arrays))
    return Weights(*(x.astype(kind) for x in arrays))


def array(w) -> np.ndarray:
    """The numbers of a weight [..., D, F], whatever it is."""
    if not isinstance(w, Blocked):
        return np.asarray(w)
    scales = np.repeat(np.repeat(w.scales, 128, -2), 128, -1)
    return np.asarray(w.values, np.float32) * scales[..., : w.shape[-2], : w.shape[-1]]


def rows(weights: Weights, physical_to_logical_P: np.ndarray) -> Weights:
    """The twin: what every slot should hold."""
    return jax.tree.map(lambda x: np.asarray(x)[physical_to_logical_P], weights)


def slots(seed: int, number: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    more = draw.choice(E, number - E, p=np.arange(E) / sum(range(E)))
    return draw.permutation(np.concatenate([np.arange(E), more]))


def assert_holds(found: Weights, weights: Weights, table_P: np.ndarray) -> None:
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, found, rows(weights, table_P))
    assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, weights)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("2x4", "fp8"),
        pytest.param("1x8", "bfloat16", marks=pytest.mark.slow),
        pytest.param("2 of 2x2", "float32", marks=pytest.mark.slow),
    ],
)
def test_slots_hold_what_the_new_table_names(name: str, kind: str):
    """Whatever goes where: other copies, all slots reversed, all on their devices."""
    mesh, weights = mesh_of(name), logical(kind)
    old_Q = slots(0, 24)
    here = spread(rows(weights, old_Q), mesh)
    stay_P = old_Q.reshape(8, 3)[:, [2, 0, 1, 0]].reshape(-1)
    for new_P in (slots(1, 32), slots(2, 32), stay_P[::-1], stay_P):
        found = moved(here, old_Q, new_P, mesh)
        assert_holds(found, weights, new_P)
        for x in jax.tree.leaves(found):
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, P(EXPERT_AXES)), x.ndim)


def test_one_program_moves_every_table():
    mesh, weights = mesh_of("2x4"), logical("fp8")
    old_Q = slots(0, 24)
    here = spread(rows(weights, old_Q), mesh)
    moved(here, old_Q, slots(1, 32), mesh)
    before = expert_slots._moved._cache_size()
    for seed in range(2, 6):
        moved(here, old_Q, slots(seed, 32), mesh)
    assert expert_slots._moved._cache_size() == before


def test_what_stays_on_its_device_is_not_shown():
    """Nor what nobody lacks; and each slot that is, once."""
    devices, old_Q = 8, slots(0, 32)
    within_P = np.concatenate([np.roll(row, 1) for row in old_Q.reshape(devices, -1)])
    for new_P in (old_Q, within_P, slots(1, 32), slots(2, 64), old_Q[::-1]):
        plan = moves(old_Q, new_P, devices)
        np.testing.assert_array_equal(old_Q[plan.device_P * 4 + plan.slot_P], new_P)
        own_P = np.arange(len(new_P)) // (len(new_P) // devices)
        lacks_P = [
            e not in old_Q.reshape(devices, -1)[d] for e, d in zip(new_P, own_P, strict=True)
        ]
        np.testing.assert_array_equal(plan.turn_P >= 0, lacks_P)
        shown = {(d, s) for d, s, t in zip(*plan[:3], strict=True) if t >= 0}
        assert plan.rounds == max([sum(d == w for d, _ in shown) for w in range(devices)])
        for d, s, turn in zip(*plan[:3], strict=True):
            assert turn < plan.rounds
            assert turn < 0 or plan.shown_WI[d, turn] == s
    assert moves(old_Q, within_P, devices).rounds == 0


def test_memory_is_the_new_layer_and_an_expert_of_each_device():
    """And the new layer once more, on XLA:CPU: of sizes at which tables are nothing."""
    mesh, number, width = mesh_of("2x4"), 64, 128
    weights = jax.ShapeDtypeStruct(
        (number, width, width), jnp.bfloat16, sharding=NamedSharding(mesh, P(EXPERT_AXES))
    )
    plan = moves(np.arange(number), np.arange(number)[::-1], 8)
    compiled = expert_slots._moved.lower(weights, plan, mesh).compile()
    expert = 2 * width * width
    found = compiled.memory_analysis()
    assert found.output_size_in_bytes == pytest.approx(number // 8 * expert, rel=0.01)
    assert found.temp_size_in_bytes < (8 + number // 8 + 2) * expert


# --- made of a model's ----------------------------------------------------------------------------


def layer(num_shared: int = 2, **changes) -> MoE:
    cfg = tiny_model(d_model=D, num_experts=E, num_shared_experts=num_shared, **changes)
    return random_part(MoE, cfg)


def with_shared(moe: MoE, number: int) -> Weights:
    """The twin: experts, and slices of the shared feed-forward behind them; arrays alone."""
    part = moe.shared
    gate, up, down = (array(w[...]) for w in (part.w_gate_DF, part.w_up_DF, part.w_down_FD))
    shared = [np.stack(np.split(w, number, 1)) for w in (gate, up)]
    shared.append(np.stack(np.split(down, number, 0)))
    routed = map(array, weights_of(moe))
    return Weights(*(np.concatenate(both) for both in zip(routed, shared, strict=True)))


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        ("one device", "float32"),
        ("from the mesh", "fp8"),
        pytest.param("from one device", "fp8", marks=pytest.mark.slow),
        pytest.param("one device", "fp8", marks=pytest.mark.slow),
        pytest.param("from one device", "float32", marks=pytest.mark.slow),
        pytest.param("from the mesh", "float32", marks=pytest.mark.slow),
    ],
)
def test_a_layer_comes_apart_into_slots(start: str, kind: str):
    """Shared experts among them, from wherever the model lies."""
    moe = layer(num_shared=2, expert_hidden=12) if kind == "float32" else in_fp8(layer(1))
    number = moe.router.cfg.num_shared_experts
    wanted = with_shared(moe, number)
    table_P = np.random.default_rng(0).permutation(np.arange(32) % (E + number))
    mesh = None if start == "one device" else mesh_of("2x4")
    if start == "from the mesh":
        moe = spread_layer(moe, mesh)
    served = slots_of(moe, table_P, mesh, shared_as_routed=True)
    assert served.shared is None
    assert moe.shared is not None
    found = weights_of(served)
    if kind == "fp8":
        assert all(isinstance(w, Blocked) for w in found)
    if mesh is not None:
        assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(found))
    for w, expected in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(array(w), expected[table_P])


@pytest.mark.slow
def test_shared_experts_of_several_fp8_blocks_come_apart():
    moe = in_fp8(layer(2, expert_hidden=128))
    served = slots_of(moe, np.arange(E + 2), shared_as_routed=True)
    for w, expected in zip(weights_of(served), with_shared(moe, 2), strict=True):
        np.testing.assert_array_equal(array(w), expected)


def test_the_shared_expert_stays_where_it_is_not_routed():
    moe = layer(1)
    served = slots_of(moe, slots(0, 20))
    assert served.shared is not None
    assert_holds(weights_of(served), weights_of(moe), slots(0, 20))


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        (lambda: in_fp8(layer(1), shared=False), "shared experts are ArrayImpl of float32, routed"),
        (lambda: in_fp8(layer(2)), "2 shared experts of 12 columns in blocks of 128; allowed"),
    ],
)
def test_shared_experts_that_cannot_be_routed_are_told(moe, message: str):
    with pytest.raises(ValueError, match=message):
        slots_of(moe(), np.arange(20), shared_as_routed=True)


def test_an_expert_that_nobody_has_cannot_move():
    with pytest.raises(AssertionError, match=r"experts \[3\] are in no old slot"):
        moved(logical("float32"), np.arange(E) % 3, np.array([0, 3]))
