"""Steps are compiled in the background, once for each number of rows, in the state's shapes."""

from dataclasses import replace

import jax
import pytest

from dsv3_jax.train import programs
from dsv3_jax.train.programs import StepPrograms
from dsv3_jax.train.step import abstract_state
from tests.runs import SmallRun


class Lowered:
    """In place of a jitted step: keeps what it is lowered for, and compiles to its rows."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def lower(self, *shapes: object) -> "Lowered":
        self.calls.append(shapes)
        return self

    def compile(self) -> str:
        rows, _ = self.calls[-1][1].labels_BT.shape
        if rows == 13:
            raise MemoryError("no room")
        return f"of {rows} rows"


@pytest.fixture
def lowered(monkeypatch) -> Lowered:
    step = Lowered()
    monkeypatch.setattr(programs, "make_step", lambda graphdef, cfg: step)
    return step


def programs_of(small: SmallRun, *, isolate: bool) -> StepPrograms:
    cfg = replace(small.cfg, data=replace(small.cfg.data, isolate=isolate))
    return StepPrograms(cfg, *abstract_state(cfg))


def test_each_number_of_rows_is_compiled_once(small: SmallRun, lowered: Lowered):
    made = programs_of(small, isolate=False)
    assert 2 not in made
    made.begin(2)
    made.begin(2)
    made.wait(2)
    assert 2 in made
    assert 4 not in made
    made.wait(4)
    assert (made[2], made[4]) == ("of 2 rows", "of 4 rows")
    assert len(lowered.calls) == 2


@pytest.mark.parametrize("isolate", [False, True])
def test_the_step_is_lowered_for_what_the_loop_hands_it(small, lowered, isolate: bool):
    made = programs_of(small, isolate=isolate)
    made.wait(3)
    ((state, batch, coefficients),) = lowered.calls
    length = small.cfg.data.length
    assert state is made.shapes
    assert {x.shape for x in jax.tree.leaves(batch)} == {(3, length)}
    assert (batch.segments_BT is not None) == isolate
    assert {(x.shape, str(x.dtype)) for x in coefficients} == {((), "float32")}


def test_what_goes_wrong_in_the_thread_is_raised_where_it_is_waited_for(small, lowered):
    made = programs_of(small, isolate=False)
    made.begin(13)
    with pytest.raises(MemoryError, match="no room"):
        made.wait(13)
