"""Cuts of a model into stages: as written, or balanced, and what is no cut of it."""

import re
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.parallel.stages import Cut, balanced, cut, whole

COSTS = st.lists(st.integers(0, 9), min_size=1, max_size=9)


def pieces(costs: list, sizes: list[int]) -> list[list]:
    """The items of each stage."""
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [costs[start:end] for start, end in pairwise(bounds)]


def dearest(costs: list, sizes: list[int]) -> float:
    return max(map(sum, pieces(costs, sizes)))


def compositions(items: int, stages: int) -> list[list[int]]:
    """All ways to cut so many items into stages, none of them empty."""
    found = []
    for inner in combinations(range(1, items), stages - 1):
        bounds = [0, *inner, items]
        found.append([end - start for start, end in pairwise(bounds)])
    return found


@settings(max_examples=60)
@given(COSTS, st.data())
def test_no_other_cut_has_a_cheaper_dearest_stage(costs: list[int], data):
    stages = data.draw(st.integers(1, len(costs)))
    sizes = balanced(costs, stages)
    assert sizes in compositions(len(costs), stages)
    least = min(dearest(costs, other) for other in compositions(len(costs), stages))
    assert dearest(costs, sizes) == least


@settings(max_examples=60)
@given(COSTS, st.data())
def test_of_equally_good_cuts_the_last_stage_gets_least(costs: list[int], data):
    """And of those with that last stage the one before it gets least, and so on."""
    stages = data.draw(st.integers(1, len(costs)))
    sizes, items = balanced(costs, stages), len(costs)
    while stages > 1:
        ways = compositions(items, stages)
        least = min(dearest(costs[:items], way) for way in ways)
        best = [way[-1] for way in ways if dearest(costs[:items], way) == least]
        assert sizes[stages - 1] == min(best)
        items, stages = items - sizes[stages - 1], stages - 1


@settings(max_examples=60)
@given(st.integers(1, 20), st.integers(0, 2), st.data())
def test_any_number_of_layers_goes_into_any_number_of_stages(layers: int, mtp: int, data):
    """Each item is in one stage, in order, and no stage is empty; what is balanced can be written
    out and read again.
    """
    stages = data.draw(st.integers(1, layers + mtp + 2))
    cuts = cut("", stages, layers, mtp, [1.0] * (layers + mtp + 2))
    assert len(cuts) == stages
    assert [i for c in cuts for i in range(c.first_layer, c.end_layer)] == list(range(layers))
    assert [i for c in cuts for i in range(c.first_mtp, c.end_mtp)] == list(range(mtp))
    assert [c.embed for c in cuts] == [True] + [False] * (stages - 1)
    assert sum(c.head for c in cuts) == 1
    assert all(map(str, cuts))
    written = "|".join(map(str, cuts))
    assert cut(written, stages, layers, mtp, []) == cuts


def test_a_written_cut_is_taken_as_it_stands():
    cuts = cut("E+2 | 1|3+H|M+M", 4, 6, 2, [])
    assert cuts == (
        Cut(0, 2, True, False, 0, 0),
        Cut(2, 3, False, False, 0, 0),
        Cut(3, 6, False, True, 0, 0),
        Cut(6, 6, False, False, 0, 2),
    )
    assert [c.has_mtp for c in cuts] == [False, False, False, True]
    assert cut("E|1+2|H", 3, 3, 0, []) == cut("E|3|H", 3, 3, 0, [])


def test_a_stage_knows_which_of_some_layers_it_holds():
    middle = Cut(2, 5, False, False, 0, 0)
    assert middle.layers(0, 3) == range(2, 3)
    assert middle.layers(3, 9) == range(3, 5)
    assert not middle.layers(6, 9)
    assert not middle.layers(0, 1)
    assert not Cut(0, 0, True, False, 0, 0).layers(0, 3)


def test_one_stage_is_the_whole_model():
    assert cut("", 1, 7, 1, [1.0] * 10) == (whole(7, 1),)
    assert str(whole(7, 2)) == "E+7+H+M+M"


def test_costs_decide_where_the_cuts_are():
    """61 layers, a head and an MTP module that cost as much as two layers each: the report's."""
    costs = [0.0, *[1.0] * 61, 2.0, 2.0]
    assert "|".join(map(str, cut("", 4, 61, 1, costs))) == "E+17|17|17|10+H+M"
    assert balanced([9, 1, 1, 1], 2) == [1, 3]
    assert balanced([1, 1, 1, 9], 2) == [3, 1]


@pytest.mark.parametrize(
    ("written", "stages", "said"),
    [
        ("E+3+H", 2, "'E+3+H' has 1 stage; allowed here: 2"),
        ("E+1|2|H", 2, "'E+1|2|H' has 3 stages; allowed here: 2"),
        (f"E+{10**20}|2+H+M", 2, f"'E+{10**20}|2+H+M' is no cut of this model; allowed: cuts of "),
        ("E+1|2", 2, "'E+1|2' is no cut of this model; allowed: cuts of E+3+H+M"),
        ("E+1|3+H+M", 2, "allowed: cuts of E+3+H+M"),
        ("E+3+M|H", 2, "allowed: cuts of E+3+H+M"),
        ("3+E|H+M", 2, "allowed: cuts of E+3+H+M"),
        ("E+3+H+M|", 2, "has a stage with ''; allowed: stages between |"),
        ("E+3||H+M", 3, "has a stage with ''"),
        ("E+0|3+H+M", 2, "has a stage with '0'"),
        ("E+x|3+H+M", 2, "has a stage with 'x'"),
        ("E+-1|4+H+M", 2, "has a stage with '-1'"),
        ("E+٣|H+M", 2, "has a stage with '٣'"),
        ("", 7, "the model has 6 items to cut (embedding, 3 layers, head, 1 MTP modules); allowed"),
        ("E|1|1|1|H|M|", 7, "at most as many stages, and 7 are asked for"),
    ],
)
def test_what_is_no_cut_is_told_with_what_is_allowed(written: str, stages: int, said: str):
    with pytest.raises(ValueError, match=re.escape(said)):
        cut(written, stages, 3, 1, [1.0] * 6)
