"""What the seconds of a step are spent on, largest first: the terms behind a run's device-hours."""

from collections import Counter
from collections.abc import Iterator, Mapping

from dsv3_jax.plan.layer_time import (
    Job,
    Part,
    forward_parts,
    input_gradient_parts,
    weight_gradient_parts,
)
from dsv3_jax.plan.prediction import Prediction
from dsv3_jax.plan.products import items_of
from dsv3_jax.plan.traffic import exchange_of


def terms_of(prediction: Prediction) -> Mapping[str, float]:
    """Seconds of a step at the full batch, mean of its ranks; they add up to the step."""
    step, timeline = prediction.step, prediction.step.timeline
    ranks, microbatches = timeline.schedule.ranks, timeline.schedule.microbatches
    busy = sum(timeline.busy) / ranks
    found: Counter[str] = Counter()
    for part in _parts(prediction.stepper.job):
        found[_kind(part)] += part.seconds * microbatches / ranks
    if exchange_of(prediction.cfg):  # without one the two are the same but for rounding
        found["exchange that is seen, and SMs that it takes"] = busy - found.total()
    found["bubble"] = timeline.makespan - busy
    found["ZeRO-1"], found["update"] = step.sync, step.update
    return {name: seconds for name, seconds in found.most_common() if seconds}


def _parts(job: Job) -> Iterator[Part]:
    """Computation of a micro-batch in all stages, forward and backward."""
    for item in items_of(job.cfg.model):
        for parts in (forward_parts, input_gradient_parts, weight_gradient_parts):
            yield from parts(job, item)


def _kind(part: Part) -> str:
    if part.name.endswith(", again"):
        return "recomputation"
    if part.name == "core attention":
        return "core attention"
    if part.name.startswith("FP8 casts") or part.name.endswith("in blocks of 128×1"):
        return "quantisation in device memory"
    return "rows of the embedding" if part.name.startswith("rows") else "matrix products"
