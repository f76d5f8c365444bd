"""Counts of drafts: those behind a wrong one are not looked at."""

from dsv3_jax.inference.statistics import Statistics


def test_a_draft_is_offered_where_those_before_it_stayed_and_accepted_where_it_stays():
    found = Statistics(offered=[0, 0, 0], accepted=[0, 0, 0])
    for allowed, taken in ((2, 1), (2, 3), (1, 2), (0, 1)):
        found.step(allowed, taken)
    assert found.steps == 4
    assert found.offered == [3, 1, 0]
    assert found.accepted == [2, 1, 0]
    assert found.acceptance == [2 / 3, 1, None]
