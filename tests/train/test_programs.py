"""Steps are compiled in the background, once for each number of rows, in the state's shapes."""

import threading
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest

from dsv3_jax.config import Phase
from dsv3_jax.train import programs, start
from dsv3_jax.train.programs import StepPrograms
from dsv3_jax.train.step import abstract_state
from tests.runs import SmallRun


class Lowered:
    """In place of a jitted step: keeps what it is lowered for, and compiles to its rows when it may
    go on.
    """

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.go_on = threading.Event()

    def lower(self, *shapes: object) -> "Lowered":
        self.calls.append(shapes)
        return self

    def compile(self) -> str:
        rows, _ = self.calls[-1][1].labels_BT.shape
        assert self.go_on.wait(60)
        if rows == 13:
            raise MemoryError("no room")
        return f"of {rows} rows"


@pytest.fixture
def lowered(monkeypatch) -> Lowered:
    step = Lowered()
    monkeypatch.setattr(programs, "make_step", lambda graphdef, cfg, sharding: step)
    return step


def programs_of(small: SmallRun, *, isolate: bool) -> StepPrograms:
    cfg = replace(small.cfg, data=replace(small.cfg.data, isolate=isolate))
    return StepPrograms(cfg, *abstract_state(cfg))


def test_each_number_of_rows_is_compiled_once(small: SmallRun, lowered: Lowered):
    made = programs_of(small, isolate=False)
    assert 2 not in made
    made.begin(2)
    made.begin(2)
    assert 2 not in made  # and the caller goes on
    lowered.go_on.set()
    assert made.of(2) == "of 2 rows"
    assert 2 in made
    assert 4 not in made
    assert (made.of(4), made.of(2)) == ("of 4 rows", "of 2 rows")
    assert len(lowered.calls) == 2


@pytest.mark.parametrize("isolate", [False, True])
def test_the_step_is_lowered_for_what_the_loop_hands_it(small, lowered, isolate: bool):
    made = programs_of(small, isolate=isolate)
    lowered.go_on.set()
    made.of(3)
    ((state, batch, coefficients),) = lowered.calls
    length = small.cfg.data.length
    assert state is made.shapes
    assert {(x.shape, str(x.dtype)) for x in jax.tree.leaves(batch)} == {((3, length), "int32")}
    assert (batch.segments_BT is not None) == isolate
    assert {(x.shape, str(x.dtype)) for x in coefficients} == {((), "float32")}


def test_what_goes_wrong_in_the_thread_is_raised_where_it_is_waited_for(small, lowered):
    made = programs_of(small, isolate=False)
    made.begin(13)
    lowered.go_on.set()
    with pytest.raises(MemoryError, match="no room"):
        made.of(13)


@pytest.mark.parametrize(
    ("is_new", "step", "consumed", "rows"),
    [(True, 0, 0, 3), (True, 4, 9, 3), (False, 2, 6, 3), (False, 4, 12, 6), (False, 6, 24, 0)],
)
def test_the_first_program_is_that_of_the_next_step(small, is_new, step, consumed, rows: int):
    """Of a ramp from 3 rows to 6; weights alone of another run do not count."""
    length = small.cfg.data.length
    schedule = replace(small.cfg.schedule, rows_phases=(Phase(0, 12 * length, 3),))
    cfg = replace(
        small.cfg, schedule=schedule, train=replace(small.cfg.train, rows=6, microbatches=2)
    )
    checkpoint = SimpleNamespace(step=step, meta={"consumed_rows": consumed})
    assert start.next_rows(SimpleNamespace(cfg=cfg, checkpoint=checkpoint, is_new=is_new)) == rows
    assert start.next_rows(SimpleNamespace(cfg=cfg, checkpoint=None, is_new=False)) == 3
