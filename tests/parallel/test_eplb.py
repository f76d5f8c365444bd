"""Placement of experts: the published vector, an exact twin, what holds always and what mostly."""

from fractions import Fraction

import numpy as np
import pytest

from dsv3_jax.parallel.eplb import rebalance_experts

# Of the published example: two layers of 12 experts in 4 groups, 16 replicas, 2 nodes, 8 devices.
LOADS = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
HIERARCHICAL = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]
GLOBAL = [10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1]

V3 = (288, 8, 4, 32)  # prefill: 9 experts on each of 32 devices in 4 nodes (report 3.4.1)


def test_the_published_placement_is_reproduced():
    physical_to_logical_LP, _, _ = rebalance_experts(LOADS, 16, 4, 2, 8)
    assert physical_to_logical_LP.tolist() == HIERARCHICAL


def test_groups_that_do_not_divide_among_nodes_are_placed_globally():
    assert rebalance_experts(LOADS[:1], 16, 3, 2, 8)[0].tolist() == [GLOBAL]
    assert rebalance_experts(LOADS[:1], 16, 1, 1, 8)[0].tolist() == [GLOBAL]


# --- the twin: the rules as loops, in whole fractions ---------------------------------------------


def pack(loads: list[Fraction], bins: int) -> list[list[int]]:
    room = len(loads) // bins
    if room == 1:
        return [[i] for i in range(bins)]
    packed: list[list[int]] = [[] for _ in range(bins)]
    for item in sorted(range(len(loads)), key=lambda i: -loads[i]):
        free = [b for b in range(bins) if len(packed[b]) < room]
        packed[min(free, key=lambda b: sum(loads[i] for i in packed[b]))].append(item)
    return packed


def placed(load_E: list[int], replicas: int, groups: int, nodes: int, devices: int) -> list[int]:
    """Logical id of every replica of one layer."""
    if groups % nodes:
        groups = nodes = 1
    size, found = len(load_E) // groups, []
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    for of_node in pack([sum(load_E[e] for e in group) for group in members], nodes):
        experts = [e for g in of_node for e in members[g]]
        count = dict.fromkeys(experts, 1)
        copies = list(experts)
        while len(copies) < replicas // nodes:
            busiest = max(experts, key=lambda e: Fraction(load_E[e], count[e]))
            count[busiest] += 1
            copies.append(busiest)
        shares = [Fraction(load_E[e], count[e]) for e in copies]
        found += [copies[i] for device in pack(shares, devices // nodes) for i in device]
    return found


DIVISIBLE = 720720  # by 1 to 16: shares among so many copies are whole, sums of floats exact
SIZES = [(16, 4, 2, 8), (24, 4, 4, 8), (16, 3, 2, 8), (12, 4, 2, 4), (16, 1, 1, 16), (24, 6, 2, 2)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_placement_equals_the_rules_written_as_loops(sizes: tuple[int, ...]):
    draw = np.random.default_rng(0)
    few = draw.integers(0, 4, (20, 12))  # many ties, zeros among them
    many = (np.exp(2 * draw.standard_normal((20, 12))) * 100).astype(int)
    load_LE = np.concatenate([few, many]) * DIVISIBLE
    found = rebalance_experts(load_LE, *sizes)[0]
    assert found.tolist() == [placed(load_E, *sizes) for load_E in load_LE.tolist()]


# --- invariances ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["random", "zero", "one"])
def test_tables_agree(sizes: tuple[int, ...], kind: str):
    load_LE = np.random.default_rng(1).integers(0, 100, (5, 12))
    load_LE *= {"random": 1, "zero": 0, "one": np.arange(12) == 7}[kind]
    physical_to_logical_LP, logical_to_physical_LEC, count_LE = rebalance_experts(load_LE, *sizes)
    assert physical_to_logical_LP.shape == (5, sizes[0])
    assert (count_LE >= 1).all()
    assert (count_LE.sum(1) == sizes[0]).all()
    assert logical_to_physical_LEC.shape == (5, 12, count_LE.max())
    for layer in range(5):
        for expert in range(12):
            row_C, count = logical_to_physical_LEC[layer, expert], count_LE[layer, expert]
            copies = np.flatnonzero(physical_to_logical_LP[layer] == expert)
            assert sorted(row_C[:count]) == copies.tolist()
            assert (row_C[count:] == -1).all()


def test_copies_of_an_expert_stay_on_its_node():
    draw = np.random.default_rng(2)
    load_LE = np.exp(2 * draw.standard_normal((20, 256)))
    physical_to_logical_LP, _, _ = rebalance_experts(load_LE, *V3)
    for row_P in physical_to_logical_LP:
        groups = [set(row_NP // 32) for row_NP in row_P.reshape(4, 72)]
        assert [len(g) for g in groups] == [2, 2, 2, 2]
        assert set.union(*groups) == set(range(8))


def test_layers_do_not_know_of_each_other():
    draw = np.random.default_rng(3)
    load_LE = draw.random((4, 12))
    together = rebalance_experts(load_LE, 16, 4, 2, 8)[0]
    alone = [rebalance_experts(load_LE[i : i + 1], 16, 4, 2, 8)[0][0] for i in range(4)]
    np.testing.assert_array_equal(together, alone)


def test_the_unit_of_loads_does_not_matter():
    load_LE = np.random.default_rng(4).random((4, 12))
    found, scaled = (rebalance_experts(x, 16, 4, 2, 8)[0] for x in (load_LE, load_LE * 2.0**-70))
    np.testing.assert_array_equal(found, scaled)


def test_loads_may_be_few_or_whole():
    tables = rebalance_experts(np.zeros((0, 12)), 16, 4, 2, 8)
    assert [table.shape for table in tables] == [(0, 16), (0, 12, 1), (0, 12)]
    assert rebalance_experts(LOADS.astype(np.int32), 16, 4, 2, 8)[0].tolist() == HIERARCHICAL


# --- balance --------------------------------------------------------------------------------------


def device_loads(load_LE: np.ndarray, physical_to_logical_LP: np.ndarray, devices: int):
    """[L, devices], each expert's load split evenly between its copies."""
    layers, experts = load_LE.shape
    count_LE = np.stack([np.bincount(row, minlength=experts) for row in physical_to_logical_LP])
    share_LP = np.take_along_axis(load_LE / count_LE, physical_to_logical_LP, 1)
    return share_LP.reshape(layers, devices, -1).sum(-1)


def least_largest_share(load_E: np.ndarray, replicas: int) -> float:
    """The smallest x for which counts of ceil(load / x) are at most so many, by trial of every
    share that there is.
    """
    shares = np.unique(load_E[:, None] / np.arange(1, replicas + 1)[None])
    shares = shares[shares > 0]
    low, high = 0, len(shares) - 1
    while low < high:
        middle = (low + high) // 2
        needed = np.maximum(np.ceil(load_E / shares[middle] - 1e-9), 1).sum()
        low, high = (low, middle) if needed <= replicas else (middle + 1, high)
    return shares[low]


def random_loads(draw: np.random.Generator) -> dict[str, np.ndarray]:
    """100 layers of 256 experts, from nearly even to most tokens on a handful."""
    experts = 256
    zipf_E = 1 / np.arange(1, experts + 1)
    hot = draw.random((25, experts))
    hot[np.arange(25), draw.integers(0, experts, 25)] *= 200
    return {
        "uniform": draw.random((25, experts)),
        "lognormal": np.exp(draw.standard_normal((25, experts))),
        "zipf": np.stack([draw.permutation(zipf_E) for _ in range(25)]),
        "one hot": hot,
    }


POLICIES = {"hierarchical": V3, "global": (288, 1, 1, 32)}


@pytest.mark.parametrize("policy", POLICIES)
def test_no_device_has_less_than_it_must_and_none_more_than_without_eplb(policy: str):
    """Of 100 loads, skewed ones among them.

    That no placement of so many replicas is below the bound is a theorem: some device has the mean
    at least, and some device has the largest share, which no choice of counts makes smaller than
    `least_largest_share`. That the result is below identity placement (8 neighbours on each
    device, no copies) is none: of two devices and shares 3, 3, 0 | 2, 2, 2 greedy packing makes 7
    and 5. On these loads it holds. `-s` prints by how much.
    """
    replicas, *_, devices = POLICIES[policy]
    for name, load_LE in random_loads(np.random.default_rng(5)).items():
        table = rebalance_experts(load_LE, *POLICIES[policy])[0]
        most_L = device_loads(load_LE, table, devices).max(1)
        identity_L = load_LE.reshape(len(load_LE), devices, -1).sum(-1).max(1)
        mean_L = load_LE.sum(1) / devices
        share_L = np.array([least_largest_share(row, replicas) for row in load_LE])
        bound_L = np.maximum(mean_L, share_L)
        assert (most_L >= bound_L * (1 - 1e-12)).all()
        assert (most_L <= identity_L).all()
        print(
            f"\n{policy:12} {name:10}"
            + "".join(
                f"  {what} {ratio_L.mean():5.3f} worst {ratio_L.max():5.3f}"
                for what, ratio_L in {
                    "identity/mean": identity_L / mean_L,
                    "eplb/mean": most_L / mean_L,
                    "eplb/bound": most_L / bound_L,
                    "eplb/identity": most_L / identity_L,
                }.items()
            ),
            end="",
        )


def test_greedy_packing_is_not_always_below_identity_placement():
    """The example of above: why that comparison is no theorem."""
    load_LE = np.array([[3, 3, 0, 2, 2, 2]])
    table = rebalance_experts(load_LE, 6, 1, 1, 2)[0]
    assert device_loads(load_LE, table, 2).tolist() == [[7, 5]]


def test_no_other_counts_have_a_smaller_largest_share():
    """A theorem of the global policy: greedy copying is the best there is."""
    for load_LE in random_loads(np.random.default_rng(6)).values():
        count_LE = rebalance_experts(load_LE, 288, 1, 1, 288)[2]
        wanted = [least_largest_share(row, 288) for row in load_LE]
        np.testing.assert_allclose((load_LE / count_LE).max(1), wanted, rtol=1e-12)


# --- wrong input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "sizes", "message"),
    [
        (LOADS[0], (16, 4, 2, 8), "shape (12,); allowed: [layers, experts]"),
        (-LOADS, (16, 4, 2, 8), "expert 0 in layer 0 is -90.0; allowed: finite"),
        (np.where(LOADS == 64, np.nan, LOADS), (16, 4, 2, 8), "expert 3 in layer 1 is nan;"),
        (np.where(LOADS == 27, np.inf, LOADS), (16, 4, 2, 8), "expert 11 in layer 1 is inf;"),
        (LOADS, (8, 4, 2, 8), "number of replicas is 8; allowed: at least 12 experts"),
        (LOADS, (15, 4, 2, 8), "15 replicas for 8 devices; allowed: a multiple of 8"),
        (LOADS, (16, 8, 2, 8), "12 experts for 8 groups; allowed: a multiple of 8"),
        (LOADS, (14, 4, 2, 7), "7 devices for 2 nodes; allowed: a multiple of 2"),
        (LOADS, (16, 0, 2, 8), "number of groups is 0; allowed: 1 or more"),
        (LOADS, (16, 4, 0, 8), "number of nodes is 0; allowed: 1 or more"),
        (LOADS, (16, 4, 2, 0), "number of devices is 0; allowed: 1 or more"),
    ],
)
def test_wrong_input_is_told_in_one_line(load: np.ndarray, sizes: tuple, message: str):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        rebalance_experts(load, *sizes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
