"""What a run begins with: its first state, how it came by that, and how many rows come next."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv3_jax.checkpoint import store
from dsv3_jax.config import RunConfig
from dsv3_jax.config.run import from_dict
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.train import snapshot
from dsv3_jax.train.folder import RunFolder
from dsv3_jax.train.kind import Kind
from dsv3_jax.train.pipeline_run import PipelineRun
from dsv3_jax.train.programs import StepPrograms
from dsv3_jax.train.records import event_record
from dsv3_jax.train.sameness import differences
from dsv3_jax.train.schedules import rows_at
from dsv3_jax.train.snapshot import Position, Snapshot
from dsv3_jax.train.writers import Writer


@dataclasses.dataclass
class Prepared:
    """What `execute` needs."""

    cfg: RunConfig
    run: RunFolder
    corpus: Corpus
    checkpoint: store.Checkpoint | None
    """Let go once its arrays are on the device"""
    is_new: bool
    """The folder is this run's first; of a checkpoint only the weights are taken"""
    writers: list[Writer]
    weights_from: Path | None = None
    """Whose weights a new run starts from, if it does"""
    moments: bool = False
    """And whose moments"""
    kind: Kind = dataclasses.field(default_factory=Kind)

    @property
    def origin(self) -> str:
        """Of the weights that a new run starts from; what is no run has no steps."""
        imported = "imported_from" in self.checkpoint.meta
        step = "" if imported else f"step {self.checkpoint.step} of "
        return f"{'and moments ' * self.moments}of {step}{self.weights_from}"


def next_rows(prepared: Prepared) -> int:
    """Rows of the next step, the first one's unless a run is resumed; 0 if all steps are done."""
    cfg, checkpoint = prepared.cfg, prepared.checkpoint
    if prepared.is_new or checkpoint is None:
        return rows_at(cfg, 0)
    if checkpoint.step == cfg.train.steps:
        return 0
    return rows_at(cfg, checkpoint.meta["consumed_rows"] * cfg.data.length)


def started(
    prepared: Prepared, programs: StepPrograms | PipelineRun, say: Callable[[str], None]
) -> Snapshot:
    """A fresh state, the checkpoint's, or a fresh one with the checkpoint's weights."""
    cfg, checkpoint = prepared.cfg, prepared.checkpoint
    if checkpoint is None:
        state = programs.init_state()
        if not prepared.is_new:
            say("           never saved: starting over")
        return Snapshot(state, Position())
    if prepared.is_new:
        say(f"           from the weights {prepared.origin}")
        if prepared.moments:
            restored = snapshot.restore(checkpoint, cfg, programs.shapes)
            return Snapshot(restored.state, Position())
        return Snapshot(snapshot.weights_of(checkpoint, cfg, programs.init_state()), Position())
    start = snapshot.restore(checkpoint, cfg, programs.shapes)
    say(f"           resumed after step {start.position.step:,}")
    return start


def origin_of(prepared: Prepared, position: Position) -> dict[str, Any] | None:
    """What the run's entries tell of how it came by its weights; None for fresh ones."""
    cfg, checkpoint = prepared.cfg, prepared.checkpoint
    if checkpoint is None or position.step == cfg.train.steps:  # nothing will come of it
        return None
    if prepared.is_new:
        return event_record(cfg, position, "weights", prepared.origin)
    before = from_dict(RunConfig, checkpoint.meta["config"])
    changed = [
        text
        for name in ("train", "schedule", "optimizer", "data", "quant", "mesh", "pipeline")
        for text in differences(name, getattr(cfg, name), getattr(before, name))
    ]
    text = "; ".join([f"after step {position.step}", *changed])
    return event_record(cfg, position, "resumed", text)


def never_saved(run: RunFolder) -> bool:
    """Whether a run was stopped before its first checkpoint was complete.

    A kill leaves at most one folder that lacks its mark; two are no kill's work.
    """
    whole = [path for path in run.checkpoints.glob("step_*") if ".tmp-" not in path.name]
    return not store.steps(run.checkpoints) and len(whole) <= 1
