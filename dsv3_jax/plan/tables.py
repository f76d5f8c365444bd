"""A plan as tables for people and as JSON for programs, the same figures in both."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from dsv3_jax.plan.cells import new_table, number
from dsv3_jax.plan.derivation import OUTCOME, Line, derivation
from dsv3_jax.plan.hardware import Hardware
from dsv3_jax.plan.layer_time import NOT_COUNTED
from dsv3_jax.plan.prediction import Prediction
from dsv3_jax.plan.serving import Serving
from dsv3_jax.plan.serving_lines import serving_lines

if TYPE_CHECKING:
    from rich.table import Table


def plan_json(prediction: Prediction) -> dict[str, Any]:
    """A training run."""
    return _json(derivation(prediction), prediction.hardware) | {
        "stages": [dict(zip(STAGE_KEYS, row, strict=True)) for row in _stage_rows(prediction)],
        "steps": [dict(zip(STEP_KEYS, row, strict=True)) for row in _step_rows(prediction)],
    }


def serving_json(serving: Serving) -> dict[str, Any]:
    """A serving layout."""
    return _json(serving_lines(serving), serving.hardware)


def _json(lines: Sequence[Line], hardware: Hardware) -> dict[str, Any]:
    return {
        "hardware": hardware.name,
        "assumed": list(hardware.assumed),
        "not_counted": NOT_COUNTED,
        "lines": [asdict(line) for line in lines],
    }


def plan_tables(prediction: Prediction) -> list["Table"]:
    """A training run, a table a question. What memory holds (`memory_of`) is the first question:
    its tables stand in front of these.
    """
    lines = line_tables(derivation(prediction))
    stages = new_table("stages, ms of a micro-batch", *STAGE_KEYS)
    for stage, cut, *times in _stage_rows(prediction):
        stages.add_row(str(stage), cut, *(number(time) for time in times))
    steps = new_table("steps of the run", *STEP_KEYS)
    for rows, count, schedule, seconds in _step_rows(prediction):
        steps.add_row(f"{rows:,}", f"{count:,}", schedule, number(seconds))
    place = [table.title for table in lines].index(OUTCOME)
    return [*lines[:place], stages, steps, *lines[place:]]


def serving_tables(serving: Serving) -> list["Table"]:
    """A serving layout."""
    return line_tables(serving_lines(serving))


def line_tables(lines: Sequence[Line]) -> list["Table"]:
    """One for each section, in order."""
    tables = []
    for section, some in groupby(lines, key=lambda line: line.section):
        table = new_table(section, "", "value", "unit", "from", "source")
        for line in some:
            cells = (line.label, number(line.value), line.unit, line.formula, line.source)
            table.add_row(*cells)
        tables.append(table)
    return tables


STAGE_KEYS = ("stage", "cut", "F", "b", "W", "FB")
STEP_KEYS = ("rows", "steps", "schedule", "seconds")


def _stage_rows(p: Prediction) -> list[tuple[Any, ...]]:
    return [
        (
            number,
            str(stage.cut),
            stage.forward.alone * 1e3,
            stage.inputs.alone * 1e3,
            stage.weights.alone * 1e3,
            p.stepper.overlap.pair(stage.forward + stage.backward) * 1e3,
        )
        for number, stage in enumerate(p.stepper.stages)
    ]


def _step_rows(p: Prediction) -> list[tuple[Any, ...]]:
    return [(step.rows, count, step.schedule, step.seconds) for step, count in p.run]
