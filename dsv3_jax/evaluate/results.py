"""Results of an evaluation as JSON and as a Markdown page, with what is needed to repeat them."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsv3_jax.evaluate.protocol import Run, Summary, benchmark_of, scoring_of, summary
from dsv3_jax.evaluate.rolling import TextScore

# What lm-eval does -> the report's two ways; another one (rolling) is neither.
_WAYS = {
    "multiple_choice": "perplexity",
    "loglikelihood": "perplexity",
    "generate_until": "generation",
}
# What `Subject` counts.
_COUNTED = {
    "scored": "Rows scored",
    "written": "texts written",
    "cut": "beginnings cut for want of room",
    "shortened": "texts that the model's length ended",
}


@dataclass(frozen=True)
class TaskScore:
    """One metric of a task or a group, over all its runs."""

    task: str
    version: str
    shots: int | None
    metric: str
    filter: str
    scored: str
    """lm-eval's word for how: `multiple_choice`, `generate_until` ...; '' of a group"""
    samples: int | None
    of: int | None
    """Samples that the whole set has"""
    higher_is_better: bool | None
    error: float | None
    """Standard error over samples, of the first run"""
    runs: Sequence[Run]
    values: Sequence[float]

    @property
    def summary(self) -> Summary:
        return summary(self.values)

    @property
    def departs(self) -> bool:
        """Whether the report scores base models the other way on what this measures."""
        ours, theirs = _WAYS.get(self.scored), scoring_of(self.task)
        return None not in (ours, theirs) and ours != theirs


@dataclass(frozen=True)
class Results:
    """All of one evaluation; `made` is what it was made with."""

    made: Mapping[str, Any]
    counts: Mapping[str, int]
    tasks: Sequence[TaskScore] = ()
    texts: Mapping[str, TextScore] = field(default_factory=dict)

    def to_json(self) -> str:
        """Numbers that are not finite are null."""
        tasks = [
            {
                **asdict(score),
                "benchmark": benchmark_of(score.task),
                "scored_by_report": scoring_of(score.task),
                **asdict(score.summary),
                "runs": [
                    {**asdict(run), "value": value}
                    for run, value in zip(score.runs, score.values, strict=True)
                ],
            }
            for score in self.tasks
        ]
        for task in tasks:
            del task["values"]
        texts = {
            name: {
                **score._asdict(),
                "nats_per_token": score.nats_per_token,
                "perplexity": score.perplexity,
                "bits_per_byte": score.bits_per_byte,
            }
            for name, score in self.texts.items()
        }
        content = {"made": self.made, "counts": self.counts, "tasks": tasks, "texts": texts}
        return json.dumps(_finite(content), indent=2, ensure_ascii=False) + "\n"

    def to_markdown(self) -> str:
        """A page: tables of scores, then how to repeat them."""
        parts = [f"# {self.made['checkpoint']['name']}, evaluated", *self._tables()]
        parts.append("## To repeat it\n\n" + "\n".join(_told(self.made)))
        parts.append(", ".join(f"{_COUNTED[name]}: {n:,}" for name, n in self.counts.items()) + ".")
        return "\n\n".join(parts) + "\n"

    def _tables(self) -> list[str]:
        tables = []
        if self.tasks:
            tables.append(_task_table(self.tasks))
            departing = sorted({score.task for score in self.tasks if score.departs})
            if departing:
                tables.append(
                    "The report scores base models the other way (4.4.1) on: "
                    f"{', '.join(departing)}."
                )
        if self.texts:
            tables.append(_text_table(self.texts))
        return tables


def _task_table(scores: Sequence[TaskScore]) -> str:
    head = "task|version|shots|samples|metric|score|error (samples)|spread (runs)|runs".split("|")
    rows = []
    for score in scores:
        found = score.summary
        filtered = "" if score.filter in ("", "none") else f", {score.filter}"
        whole = score.samples == score.of or score.of is None
        spread = ""
        if found.spread is not None:
            spread = f"{found.spread:.4f}, {found.least:.4f} to {found.most:.4f}"
        rows.append(
            [
                score.task,
                score.version,
                "" if score.shots is None else str(score.shots),
                f"{score.samples}" if whole else f"first {score.samples} of {score.of}",
                f"{score.metric}{filtered}",
                f"{found.mean:.4f}",
                "" if score.error is None else f"{score.error:.4f}",
                spread,
                _counted_runs(score.runs),
            ]
        )
    return _table(head, rows)


def _counted_runs(runs: Sequence[Run]) -> str:
    """Such as `3 at 0.6, 3 at 0.9`, of temperatures; or `1 as the task says`."""
    counts = Counter(run.temperature for run in runs)
    said = (f"{n} as the task says" if t is None else f"{n} at {t:g}" for t, n in counts.items())
    return ", ".join(said)


def _text_table(texts: Mapping[str, TextScore]) -> str:
    head = "text|bytes|tokens|nats per token|perplexity|bits per byte".split("|")
    rows = [
        [
            name,
            f"{score.bytes:,}",
            f"{score.tokens:,}",
            f"{score.nats_per_token:.4f}",
            f"{score.perplexity:,.4g}",
            f"{score.bits_per_byte:.4f}",
        ]
        for name, score in texts.items()
    ]
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines
    )


def _told(made: Mapping[str, Any], indent: str = "") -> list[str]:
    """Nested bullets."""
    lines = []
    for name, value in made.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}- {name}:", *_told(value, indent + "  ")]
        else:
            lines.append(f"{indent}- {name}: `{value}`")
    return lines


def _finite(content: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content


def write_results(
    folder: Path, results: Results, samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """`results.json`, `results.md`, and a `samples_<task>.jsonl` of each task."""
    (folder / "results.json").write_text(results.to_json(), "utf-8")
    (folder / "results.md").write_text(results.to_markdown(), "utf-8")
    for task, all_ in samples.items():
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in task)
        lines = (json.dumps(_finite(sample), default=str) + "\n" for sample in all_)
        (folder / f"samples_{name}.jsonl").write_text("".join(lines), "utf-8")
