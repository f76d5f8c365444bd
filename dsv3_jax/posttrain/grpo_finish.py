"""The end of a run on its own answers: a picture, a summary, the page."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from dsv3_jax.drawing import BLUE, GREY, column, new_figure, smoothed, tokens_on_x
from dsv3_jax.files import replace_file
from dsv3_jax.parallel import processes
from dsv3_jax.train.loop import Trainer
from dsv3_jax.train.machine import describe
from dsv3_jax.train.metrics import clock, read_metrics, strict_json
from dsv3_jax.train.page import write_page
from dsv3_jax.train.snapshot import Snapshot

_ENDS = 10  # most steps whose mean is the reward at the start, or at the end


def finish(trainer: Trainer, trained: Snapshot, console: Console) -> None:
    """Leaves picture, result and page in the run's folder, and says what became of the reward."""
    if not processes.is_first():
        return
    run = trainer.run
    entries = read_metrics(run.metrics)
    result = result_of(entries, trained)
    picture(entries, run.picture)
    replace_file(run.result, (strict_json(result, indent=2) + "\n").encode())
    write_page(run, trainer.cfg, describe(), entries, None)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in _rows(result, trainer):
        table.add_row(label, text)
    console.print(Panel(table, title="result", title_align="left", expand=False))


def result_of(entries: Sequence[dict[str, Any]], trained: Snapshot) -> dict[str, Any]:
    """What `result.json` holds; values at both ends are means of up to ten steps."""
    train = [entry for entry in entries if entry["kind"] == "train" and "grpo" in entry]
    count = max(1, min(_ENDS, len(train) // 2))
    ends = {"start": train[:count], "end": train[-count:]}
    return {
        "steps": trained.position.step,
        "seconds": trained.position.seconds,
        "skipped": trained.position.skipped,
        **{
            f"{name}_{end}": _mean(column(some, name))
            for name in ("reward", "kl")
            for end, some in ends.items()
        },
        **{
            f"{name}_{end}": _mean(column([entry["grpo"] for entry in some], name))
            for name in ("length", "cut", "failed", "drift")
            for end, some in ends.items()
        },
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _rows(result: dict[str, Any], trainer: Trainer) -> list[tuple[str, str]]:
    def change(name: str, form: str) -> str:
        first, last = (format(result[f"{name}_{end}"], form) for end in ("start", "end"))
        return f"{first} at the start, {last} at the end"

    run = trainer.run
    return [
        ("reward", change("reward", ".4g")),
        ("length", f"{change('length', '.1f')}, in tokens"),
        ("KL", f"{result['kl_end']:.3g} from the weights that it began with"),
        ("trained", f"{result['steps']:,} steps, {result['skipped']:,} updates skipped"),
        ("time", clock(result["seconds"])),
        ("run", str(run.path)),
        ("checkpoint", str(run.checkpoints)),
        ("picture", str(run.picture)),
        ("report", str(run.report)),
    ]


def picture(entries: Sequence[dict[str, Any]], path: Path) -> None:
    """Reward, divergence, length and drift of a run, as a PNG."""
    train = [entry for entry in entries if entry["kind"] == "train" and "grpo" in entry]
    inner = [entry["grpo"] for entry in train]
    tokens = column(train, "tokens")
    panels = {
        "Reward (mean of a step)": column(train, "reward"),
        "KL from the first weights": column(train, "kl"),
        "Length of answers (tokens)": column(inner, "length"),
        "Engine to training (nats per token)": column(inner, "drift"),
    }
    with new_figure(10, 5.4) as figure:
        axes = list(figure.subplots(2, 2, sharex=True).flat)
        for panel, (title, values) in zip(axes, panels.items(), strict=True):
            panel.set_title(title)
            panel.plot(tokens, values, color=GREY, alpha=0.35, linewidth=1)
            panel.plot(tokens, smoothed(values), color=BLUE)
        for panel in axes[2:]:
            panel.set_xlabel("tokens")
        tokens_on_x(axes[0], max(tokens, default=1))
        figure.savefig(path, format="png")
