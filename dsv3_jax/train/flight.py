"""A step on its way, and how a loop of them ended."""

from typing import Any, NamedTuple

import jax

from dsv3_jax.checkpoint.arrays import CheckpointError
from dsv3_jax.train.schedules import Values
from dsv3_jax.train.snapshot import Position, Snapshot
from dsv3_jax.train.step import StepMetrics


class Trained(NamedTuple):
    """How the loop ended: where it stands, the signal that stopped it, if one did, and why its last
    state could not be saved, if so.
    """

    snapshot: Snapshot
    stopped_by: int | None
    unsaved: CheckpointError | None = None


WAITED_FOR = ("cpu",)
"""Backends that get a step when the one before has been read"""


class Flight(NamedTuple):
    """A step that was handed to the device: what it was given, and what it will tell."""

    position: Position
    """After the step"""
    values: Values
    metrics: StepMetrics
    signals: jax.Array | None
    """That came to any process, for `Lockstep.take`"""
    told: dict[str, Any]
    """Of its batch, for its record"""
