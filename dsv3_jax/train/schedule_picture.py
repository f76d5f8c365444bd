"""A run's schedules before it runs: learning rate, rows of a step, gamma and lambda (report 4.2).

A value holds for one whole update. Of 240,000 updates a few thousand are looked at: evenly spread
ones, those of the warm-up, and at each border of a phase the last before and the first after it.
"""

from bisect import bisect_left
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dsv3_jax.config import RunConfig
from dsv3_jax.drawing import BLUE, GREY, new_figure, save_picture, tokens_on_x
from dsv3_jax.train.schedules import Values, never_reached, rows_after, values_at

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EVENLY = 1000  # updates looked at over the run, and half as many over the warm-up
OPTION = "--print-schedule"
TITLES = {
    "learning_rate": "Learning rate",
    "rows": "Rows of a step",
    "bias_speed": "Bias speed γ",
    "mtp_weight": "MTP weight λ",
}


class Update(NamedTuple):
    """One update: the values it uses and the consumed tokens before and after it."""

    step: int
    begin: int
    end: int
    values: Values


def planned_updates(cfg: RunConfig) -> list[Update]:
    """Updates that together show the whole plan, in order; the first and the last among them.

    Between two neighbours in the list, values change smoothly or not at all.
    """
    total = _tokens_after(cfg, cfg.train.steps)
    updates = []
    for step in sorted(_chosen_steps(cfg)):
        begin, end = _tokens_after(cfg, step), _tokens_after(cfg, step + 1)
        updates.append(Update(step, begin, end, values_at(cfg, step, begin, total)))
    return updates


def summary(cfg: RunConfig) -> list[str]:
    """How long the run is, and phases that it does not reach."""
    tokens = _tokens_after(cfg, cfg.train.steps)
    return [f"{cfg.train.steps:,} steps, {tokens:,} tokens", *never_reached(cfg)]


def _tokens_after(cfg: RunConfig, step: int) -> int:
    """Consumed tokens after so many updates, through whatever batch ramp there is."""
    return rows_after(cfg, 0, step) * cfg.data.length


def _chosen_steps(cfg: RunConfig) -> set[int]:
    steps, schedule = cfg.train.steps, cfg.schedule
    warm = min(schedule.warmup_steps, steps)
    chosen = {i * (steps - 1) // EVENLY for i in range(EVENLY + 1)}
    chosen |= {i * warm * 2 // EVENLY for i in range(EVENLY // 2)}
    lists = (
        schedule.learning_rate_phases,
        schedule.rows_phases,
        schedule.bias_speed_phases,
        schedule.mtp_weight_phases,
    )
    borders = {phase.end for phases in lists for phase in phases}
    firsts = {bisect_left(range(steps), b, key=lambda s: _tokens_after(cfg, s)) for b in borders}
    chosen |= {step + side for step in firsts | {warm} for side in (-1, 0)}
    return {step for step in chosen if 0 <= step < steps}


def stairs(updates: list[Update], name: str) -> tuple[list[int], list[float]]:
    """Tokens and values of a line that keeps each update's value from its begin to its end."""
    tokens = [place for update in updates for place in (update.begin, update.end)]
    values = [getattr(update.values, name) for update in updates for _ in range(2)]
    return tokens, values


def draw_schedules(cfg: RunConfig, path: Path) -> None:
    """Draws the four schedules over consumed tokens as a PNG, SVG or PDF; where a short beginning
    would not be seen beside a long run, it stands large to the left.

    ValueError for another suffix, OSError where the file cannot be written.
    """
    updates = planned_updates(cfg)
    total, early = updates[-1].end, _end_of_beginning(cfg)
    zoomed = 0 < early < 0.25 * total
    spans = (1.1 * early, total) if zoomed else (total,)
    with new_figure(11 if zoomed else 8, 8) as figure:
        ratios = (1, 2) if zoomed else (1,)
        panels = figure.subplots(4, len(spans), squeeze=False, sharex="col", width_ratios=ratios)
        for row, name in zip(panels, TITLES, strict=True):
            for panel, span in zip(row, spans, strict=True):
                _draw(panel, updates, name, span)
            row[0].set_title(TITLES[name])
        for panel, span in zip(panels[-1], spans, strict=True):
            tokens_on_x(panel, span)
            panel.set_xlabel("consumed tokens")
        if zoomed:
            panels[0, 0].set_title(f"{TITLES['learning_rate']}: the beginning")
            panels[0, 1].set_title(f"The whole run: {cfg.train.steps:,} steps")
        save_picture(figure, path, OPTION)


def _end_of_beginning(cfg: RunConfig) -> int:
    """Tokens after which neither the warm-up nor the batch ramp goes on."""
    warm = _tokens_after(cfg, min(cfg.schedule.warmup_steps, cfg.train.steps))
    return max([warm, *(phase.end for phase in cfg.schedule.rows_phases)])


def _draw(panel: "Axes", updates: list[Update], name: str, span: float) -> None:
    shown = [update for update in updates if update.begin <= span]
    tokens, values = stairs(shown, name)
    panel.plot(tokens, values, color=BLUE, linewidth=1.8)
    panel.set_ylim(0, 1.15 * max(values) or 1)
    if span == updates[-1].end:
        # A learning rate begins at next to nothing; its peak says more.
        peak = max(updates, key=lambda update: update.values.learning_rate)
        first = peak if name == "learning_rate" else updates[0]
        _annotate(panel, first.begin, getattr(first.values, name), (4, 4), "bottom")
        _annotate(panel, span, values[-1], (6, 0), "center")


def _annotate(
    panel: "Axes", tokens: int, value: float, offset: tuple[int, int], align: str
) -> None:
    """The value at a place, which an axis shows only roughly; may stand outside of the panel."""
    panel.annotate(
        f"{value:.6g}",
        (tokens, value),
        offset,
        textcoords="offset points",
        va=align,
        color=GREY,
        size=9,
        annotation_clip=False,
    )
