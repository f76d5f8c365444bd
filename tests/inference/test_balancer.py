"""The balancer knows when, places as EPLB does, and moves no more than that takes."""

from dataclasses import replace

import numpy as np
import pytest

from dsv3_jax.config import MeshConfig
from dsv3_jax.inference.balancer import Balancer, Rebalanced
from dsv3_jax.inference.expert_slots import moves
from dsv3_jax.parallel.eplb import rebalance_experts
from tests.shapes import tiny_model

E, L, SLOTS = 16, 2, 24
CFG = tiny_model(num_experts=E, num_layers=3, num_dense_layers=1)
MESH = MeshConfig(1, 1, 2, 4)


class Clock:
    """Seconds that pass when the test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def balancer(policy: str = "global", **others) -> tuple[Balancer, Clock]:
    clock = Clock()
    slots = others.pop("num_slots", SLOTS)
    return Balancer(CFG, MESH, slots, policy, clock=clock, **others), clock


def loads(seed: int, experts: int = E) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return (100 * np.exp(2 * draw.standard_normal((L, experts)))).astype(np.int32)


def expected(policy: str, load_LE: np.ndarray, slots: int = SLOTS) -> np.ndarray:
    sizes = (slots, CFG.num_groups, 2, 8) if policy == "hierarchical" else (slots, 1, 1, 8)
    return rebalance_experts(load_LE, *sizes)[0]


def device_loads(load_E: np.ndarray, table_P: np.ndarray) -> np.ndarray:
    share_E = load_E / np.bincount(table_P, minlength=len(load_E))
    return share_E[table_P].reshape(8, -1).sum(1)


def test_it_is_due_when_seconds_have_passed_since_the_last_time():
    found, clock = balancer(seconds=60)
    assert not found.due
    clock.now += 59
    assert not found.due
    clock.now += 1
    assert found.due
    found.rebalance()
    assert not found.due
    clock.now += 60
    assert found.due


def test_loads_of_a_half_life_ago_weigh_half():
    found, clock = balancer(half_life=10)
    older, newer = loads(0), loads(1)
    found.add(older)
    clock.now += 10
    found.add(newer)
    clock.now += 5  # of which nothing is seen: all fade alike
    tables = found.rebalance().tables
    wanted = expected("global", older / 2 + newer)
    for got, table in zip(tables.physical_to_logical_LP, wanted, strict=True):
        assert devices(got) == devices(table)


def devices(table_P: np.ndarray) -> list[list[int]]:
    """The experts of every device; without their order or the devices'."""
    return sorted(sorted(row.tolist()) for row in table_P.reshape(8, -1))


@pytest.mark.parametrize("policy", ["hierarchical", "global"])
def test_devices_have_what_eplb_gives_them(policy: str):
    """In another order, and so no less even; for hierarchical placement, nodes as well."""
    found, clock = balancer(policy)
    for seed in range(5):
        before_LP, load_LE = found.tables.physical_to_logical_LP, loads(seed)
        clock.now += 1e9  # older loads are forgotten
        found.add(load_LE)
        result = found.rebalance()
        wanted_LP = expected(policy, load_LE)
        for layer, table_P in enumerate(result.tables.physical_to_logical_LP):
            assert devices(table_P) == devices(wanted_LP[layer])
            if policy == "hierarchical":
                nodes = [devices_of(t) for t in (table_P, wanted_LP[layer])]
                assert nodes[0] == nodes[1]
            for ratio_L, old_P in ((result.before_L, before_LP[layer]), (result.after_L, table_P)):
                load_W = device_loads(load_LE[layer], old_P)
                assert ratio_L[layer] == pytest.approx(load_W.max() / load_W.mean())


def devices_of(table_P: np.ndarray) -> list[list[list[int]]]:
    """The same, node by node."""
    nodes = table_P.reshape(2, 4, -1)
    return sorted(sorted(sorted(row.tolist()) for row in node) for node in nodes)


@pytest.mark.parametrize("policy", ["hierarchical", "global"])
def test_tables_agree_and_never_change_their_sizes(policy: str):
    found, _ = balancer(policy)
    most = (SLOTS - E) // (2 if policy == "hierarchical" else 1) + 1
    one = np.zeros((L, E), int)
    one[:, 3] = 7
    for load_LE in (None, one, loads(0)):
        if load_LE is not None:
            found.add(load_LE)
            found.rebalance()
        table_LP, physical_LEC, count_LE = found.tables
        assert physical_LEC.shape == (L, E, most)
        assert {x.dtype for x in found.tables} == {np.dtype(np.int32)}
        for layer in range(L):
            for expert in range(E):
                slots = np.flatnonzero(table_LP[layer] == expert).tolist()
                count = count_LE[layer, expert]
                assert physical_LEC[layer, expert, :count].tolist() == slots
                assert (physical_LEC[layer, expert, count:] == -1).all()


def test_layers_that_gain_too_little_stay_as_they_are():
    found, clock = balancer(least_gain=0.2)
    found.add(loads(0))
    first_LP = found.rebalance().tables.physical_to_logical_LP
    clock.now += 1e9
    little_E = loads(0)[0] + np.arange(E) % 2 * 20  # EPLB would place these otherwise
    found.add(np.stack([little_E, loads(1)[1]]))
    result = found.rebalance()
    assert devices(expected("global", little_E[None])[0]) != devices(first_LP[0])
    np.testing.assert_array_equal(result.tables.physical_to_logical_LP[0], first_LP[0])
    assert result.moves_L[0] == 0 < result.moves_L[1]
    assert result.before_L[0] == result.after_L[0]
    assert result.after_L[1] < 0.8 * result.before_L[1]


def test_less_moves_than_by_eplb_alone():
    """And as many as the movers of weights count."""
    cfg = replace(CFG, num_experts=64)
    found = Balancer(cfg, MESH, 96, "global", clock=Clock())
    here = alone = 0
    for seed in range(5):
        old_LP, load_LE = found.tables.physical_to_logical_LP, loads(seed, 64)
        found._load_LE[:] = 0
        found.add(load_LE)
        result = found.rebalance()
        tables = result.tables.physical_to_logical_LP, expected("global", load_LE, 96)
        for layer, old_P in enumerate(old_LP):
            counts = [(moves(old_P, table_LP[layer], 8).turn_P >= 0).sum() for table_LP in tables]
            assert counts[0] == result.moves_L[layer]
            here, alone = here + counts[0], alone + counts[1]
    print(f"\nmoves {here} of {alone}")
    assert here < 0.9 * alone


def test_a_slot_keeps_an_expert_that_stays_on_its_device():
    found, _ = balancer()
    found.add(loads(0))
    old_LP = found.rebalance().tables.physical_to_logical_LP
    found.add(loads(1))
    new_LP = found.rebalance().tables.physical_to_logical_LP
    for old_P, new_P in zip(old_LP, new_LP, strict=True):
        for old_I, new_I in zip(old_P.reshape(8, -1), new_P.reshape(8, -1), strict=True):
            for expert in set(old_I) & set(new_I):
                kept = (old_I == expert) & (new_I == expert)
                assert kept.sum() == min((old_I == expert).sum(), (new_I == expert).sum())


def test_layers_without_a_load_stay_as_they_are():
    found, _ = balancer()
    start_LP = found.tables.physical_to_logical_LP
    load_LE = loads(0)
    load_LE[1] = 0
    found.add(load_LE)
    result: Rebalanced = found.rebalance()
    assert (result.tables.physical_to_logical_LP[0] != start_LP[0]).any()
    np.testing.assert_array_equal(result.tables.physical_to_logical_LP[1], start_LP[1])
    assert result.before_L[1] == result.after_L[1] == 1


def test_routed_shared_experts_have_copies_from_the_start():
    """Each has every token: more than its device's share."""
    found, _ = balancer(shared_as_routed=True)
    count_LE = found.tables.count_LE
    assert count_LE.shape == (L, E + 1)
    assert (count_LE[:, E] > 1).all()
    assert (count_LE[:, :E] <= count_LE[:, E:]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "best"}, "policy is 'best'; allowed: 'hierarchical', 'global'"),
        ({"num_slots": 20}, "20 replicas for 8 devices; allowed: a multiple of 8"),
        ({"num_slots": 8}, "number of replicas is 8; allowed: at least 16 experts"),
        (
            {"policy": "hierarchical", "shared_as_routed": True},
            "shared experts as routed ones is 1; allowed: none (hierarchical policy)",
        ),
    ],
)
def test_impossible_sizes_are_told(changes: dict, message: str):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        balancer(**changes)
    assert message in str(caught.value)


def test_hierarchical_placement_needs_groups_for_every_node():
    cfg = replace(CFG, num_groups=1, num_kept_groups=1)
    with pytest.raises(ValueError, match=r"num_groups is 1; allowed: multiples of mesh.node = 2"):
        Balancer(cfg, MESH, SLOTS, "hierarchical")
