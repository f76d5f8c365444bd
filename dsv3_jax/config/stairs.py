"""How many steps a run takes at which number of rows, while its batch grows (report 4.2)."""

from collections.abc import Iterator

from dsv3_jax.config.run import RunConfig


def stairs(cfg: RunConfig, consumed_rows: int, steps: int) -> Iterator[tuple[int, int]]:
    """Rows of a step and number of steps, for `steps` more steps after `consumed_rows`."""
    for phase in cfg.schedule.rows_phases:
        rows = int(phase.value)
        left = -(-phase.end // cfg.data.length) - consumed_rows  # rows that reach its end
        taken = min(max(-(-left // rows), 0), steps)
        if taken:
            yield rows, taken
        consumed_rows += taken * rows
        steps -= taken
    if steps:
        yield cfg.train.rows, steps
