"""Phases that follow one another, and what is said of those that do not."""

import pytest

from dsv3_jax.config import Phase, RunConfig, ScheduleConfig, TrainConfig


def test_a_phase_ends_after_it_begins():
    with pytest.raises(ValueError, match=r"ends at 5 tokens; allowed: after its begin at 5$"):
        Phase(5, 5, 1.0)


@pytest.mark.parametrize("make", [lambda x: Phase(0, 5, x), lambda x: ScheduleConfig(x)])
def test_a_value_is_one_that_float32_has(make):
    assert make(3.4e38)
    with pytest.raises(ValueError, match=r" is 1e\+39; allowed: 0 to 3\.4e\+38$"):
        make(1e39)


@pytest.mark.parametrize("name", ["learning_rate", "bias_speed", "mtp_weight", "rows"])
@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ((Phase(2, 5, 1.0),), "phase 1 begins at 2 tokens, which leaves a gap; allowed: 0"),
        (
            (Phase(0, 5000, 1.0), Phase(7000, 9000, 1.0)),
            "phase 2 begins at 7,000 tokens, which leaves a gap; allowed: 5,000",
        ),
        (
            (Phase(0, 5, 1.0), Phase(3, 9, 1.0)),
            "phase 2 begins at 3 tokens, which is an overlap; allowed: 5",
        ),
    ],
    ids=["late", "gap", "overlap"],
)
def test_a_gap_or_an_overlap_is_refused_with_the_place(name: str, phases: tuple, said: str):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        ScheduleConfig(**{f"{name}_phases": phases})
    assert str(caught.value) == f"schedule.{name}_phases: {said}"


@pytest.mark.parametrize("phase", [Phase(0, 5, 1.5), Phase(0, 5, 2.0, "linear"), Phase(0, 5, 0.0)])
def test_rows_grow_by_stairs_of_whole_rows(phase: Phase):
    with pytest.raises(ValueError, match=r"allowed: constant phases of whole rows$"):
        ScheduleConfig(rows_phases=(phase,))


def test_rows_of_a_stair_are_whole_micro_batches():
    said = r"^schedule.rows_phases: 6 rows; allowed: multiples of a micro-batch, 4 rows"
    with pytest.raises(ValueError, match=said):
        RunConfig(
            train=TrainConfig(rows=8, microbatches=2),
            schedule=ScheduleConfig(rows_phases=(Phase(0, 5, 6),)),
        )


def test_a_cosine_does_not_rise():
    with pytest.raises(ValueError, match=r"is 2e-05; allowed: at most .* = 1e-05"):
        ScheduleConfig(learning_rate=1e-5, final_learning_rate=2e-5)
    rising = Phase(0, 9, 3e-5, "linear")
    ScheduleConfig(learning_rate=1e-5, learning_rate_phases=(rising,))
