"""Which checkpoints stay."""

import itertools

import pytest

from dsv3_jax.checkpoint.retention import KEEP_ALL, Retention

STEPS = [0, 100, 200, 250, 300, 400, 430]


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (KEEP_ALL, STEPS),
        (Retention(last=2, regular=100), [400, 430]),
        (Retention(last=1, regular=100), [400, 430]),  # 430 was left by a signal
        (Retention(last=1, regular=500), [430]),
        (Retention(last=3, every=200, regular=100), [200, 300, 400, 430]),
        (Retention(last=9), STEPS),
        (Retention(every=200), STEPS),
    ],
)
def test_the_newest_those_of_a_multiple_and_the_newest_regular_one_stay(
    retention: Retention, kept: list[int]
):
    assert sorted(retention.kept(STEPS, 430)) == kept


def test_over_a_whole_run_what_was_let_go_is_never_missed():
    """The rule, applied after each save, ends where it would if nothing had been deleted before."""
    saves = [step for step in range(1, 200) if step % 10 == 0 or step % 37 == 0]
    for last, every in itertools.product((1, 2, 5), (0, 30, 50)):
        retention = Retention(last, every, regular=10)
        left: set[int] = set()
        for i, step in enumerate(saves):
            left = retention.kept({*left, step}, step)
            assert left == retention.kept(saves[: i + 1], step)
            assert step in left
            assert len(left) <= last + 1 + (step // every if every else 0)


def test_what_was_just_written_stays_though_it_is_not_the_newest():
    """A run that went back may end before it comes to where it was."""
    assert Retention(last=1, regular=50).kept([100, 120, 150], 120) == {120, 150}
