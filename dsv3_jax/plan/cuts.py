"""How a run's model is cut for its pipeline, and which schedule a step runs with, from its
configuration alone.
"""

from functools import cache

from dsv3_jax.config import ModelConfig, RunConfig
from dsv3_jax.parallel.schedules import check, fits
from dsv3_jax.parallel.stages import Cut, cut
from dsv3_jax.plan.cost import item_costs

FALLBACK = "1f1b"  # for a step of too few micro-batches


def num_stages(cfg: RunConfig) -> int:
    """Parts that the model is cut into; without a pipeline one, whatever its schedule would be."""
    ranks = cfg.mesh.pipe
    return 2 * ranks if ranks > 1 and cfg.pipeline.schedule == "dualpipev" else ranks


def cuts_of(cfg: RunConfig) -> tuple[Cut, ...]:
    """Of every stage. ValueError for a cut that cannot be."""
    return _cuts(cfg.pipeline.stages, num_stages(cfg), cfg.model, cfg.data.length)


def layer_counts(model: ModelConfig, cut: Cut) -> tuple[int, int]:
    """A stage's layers with a dense feed-forward, and those with experts."""
    dense = model.num_dense_layers
    return len(cut.layers(0, dense)), len(cut.layers(dense, model.num_layers))


@cache  # balancing many stages takes a moment
def _cuts(written: str, stages: int, model: ModelConfig, length: int) -> tuple[Cut, ...]:
    costs = item_costs(model, length)
    try:
        return cut(written, stages, model.num_layers, model.mtp_depth, costs)
    except ValueError as error:
        raise ValueError(f"pipeline.stages: {error}") from error


def check_pipeline(cfg: RunConfig) -> None:
    """ValueError for a pipeline that cannot be, or that fits no step but those of a ramp."""
    if cfg.mesh.pipe == 1:
        if cfg.pipeline.stages:
            raise ValueError(
                f"pipeline.stages is {cfg.pipeline.stages!r} with mesh.pipe 1; allowed: empty"
            )
        return
    cuts_of(cfg)
    counts = microbatch_counts(cfg)
    # Small steps of a ramp fall back to 1F1B, whose stages are dualpipe's and not dualpipev's.
    count = counts[-1] if cfg.pipeline.schedule == "dualpipev" else counts[0]
    try:
        check(cfg.pipeline.schedule, cfg.mesh.pipe, count)
    except ValueError as error:
        raise ValueError(f"pipeline.schedule, with train.microbatches: {error}") from error


def microbatch_counts(cfg: RunConfig) -> list[int]:
    """Of every step size, a ramp's too, the largest first."""
    part = cfg.train.rows // cfg.train.microbatches
    rows = [cfg.train.rows, *(int(phase.value) for phase in cfg.schedule.rows_phases)]
    return sorted({size // part for size in rows}, reverse=True)


def schedule_name(cfg: RunConfig, microbatches: int) -> str:
    """Of a step of so many: the run's, or the one for steps that are too small for it (the report's
    batch ramp) and for one rank. `check_pipeline` refuses a full batch that is too small.
    """
    ranks, name = cfg.mesh.pipe, cfg.pipeline.schedule
    if ranks == 1:
        return FALLBACK
    if fits(name, ranks, microbatches):
        return name
    assert name != "dualpipev", "1F1B has half of its stages"
    return FALLBACK
