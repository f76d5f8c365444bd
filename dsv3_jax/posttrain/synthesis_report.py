"""What a run of synthesis has made, as Markdown, JSON and a picture of lengths before and after."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.drawing import BLUE, ORANGE, new_figure, save_picture, short
from dsv3_jax.files import replace_file
from dsv3_jax.posttrain.duplicates import words
from dsv3_jax.posttrain.formats import FORMATS
from dsv3_jax.posttrain.markdown_tables import cell, table
from dsv3_jax.posttrain.sample_statistics import STAGES
from dsv3_jax.posttrain.selection import Candidate
from dsv3_jax.posttrain.synthesis_folder import NUMBERS, PICTURE, REPORT

_LENGTHS = ("count", "total", "mean", "least", "p50", "p90", "p99", "most")
_BINS = 32


def write_report(
    folder: Path,
    found: Mapping[str, Any],
    settings: Mapping[str, Any],
    stages: Mapping[str, Sequence[Candidate]],
) -> None:
    """report.json, report.md and lengths.png. OSError where they cannot be written."""
    numbers = {"statistics": found, "settings": settings}
    replace_file(folder / NUMBERS, (json.dumps(numbers, indent=2) + "\n").encode())
    draw_lengths(stages, folder / PICTURE)
    replace_file(folder / REPORT, markdown(found, settings).encode())


def markdown(found: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The report as text."""
    parts = [
        "# Synthesis",
        table(("", "number"), *((name, f"{n:,}") for name, n in _counts(found))),
        "## What became of the candidates",
        table(("", "candidates"), *((name, f"{n:,}") for name, n in found["fates"].items())),
    ]
    for title, name in (("Rejected by", "rejections"), ("Failed because", "failures")):
        if found[name]:
            rows = [(cell(said), f"{n:,}") for said, n in found[name].items()]
            parts.append(table((title, "candidates"), *rows))
    parts += ["## Lengths", f"![Words of an answer, before and after]({PICTURE})"]
    for unit in ("characters", "words", "tokens"):
        rows = list(_length_rows(found["texts"], unit))
        if rows:
            parts.append(table((unit, "stage", *_LENGTHS), *rows))
    parts += ["## Formats", "Share of answers that have one."]
    parts.append(table(("kind", "stage", *FORMATS), *_format_rows(found["texts"])))
    parts += ["## Settings", table(("", ""), *_setting_rows(settings))]
    return "\n\n".join(parts) + "\n"


def _counts(found: Mapping[str, Any]) -> list[tuple[str, int]]:
    names = ("problems", "problems contaminated", "problems with a sample", "candidates")
    return [(name, found[name]) for name in names]


def _length_rows(texts: Mapping[str, Any], unit: str) -> Any:
    for kind, stages in texts.items():
        for stage in STAGES:
            measured = stages[stage][unit]
            if measured is not None:
                numbers = (
                    f"{measured[name]:,.1f}" if name == "mean" else f"{measured[name]:,}"
                    for name in _LENGTHS
                )
                yield (kind, stage, *numbers)


def _format_rows(texts: Mapping[str, Any]) -> Any:
    for kind, stages in texts.items():
        for stage in STAGES:
            count, formats = stages[stage]["count"], stages[stage]["formats"]
            if count:
                yield (kind, stage, *(f"{100 * formats[name] / count:.1f} %" for name in FORMATS))


def _setting_rows(settings: Mapping[str, Any]) -> Any:
    for name, value in settings.items():
        yield name, cell(json.dumps(value, ensure_ascii=False))


def draw_lengths(stages: Mapping[str, Sequence[Candidate]], path: Path) -> None:
    """Words of an answer, of all candidates and of those kept, kind by kind, on a scale that
    doubles.
    """
    before, after = stages["candidates"], stages["kept"]
    kinds = list(dict.fromkeys(one.problem.kind for one in before)) or ["no answers"]
    counted = {
        name: {
            kind: [len(words(one.answer)) for one in group if one.problem.kind == kind]
            for kind in kinds
        }
        for name, group in (("candidates", before), ("kept", after))
    }
    most = max((n for named in counted.values() for ns in named.values() for n in ns), default=1)
    edges = np.geomspace(1, max(most, 2) + 1, _BINS)
    with new_figure(7, 0.6 + 1.9 * len(kinds)) as figure:
        panels = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
        for panel, kind in zip(panels, kinds, strict=True):
            for name, colour in (("candidates", BLUE), ("kept", ORANGE)):
                # No word at all is told with one word: a scale that doubles has no 0.
                panel.hist(np.maximum(counted[name][kind], 1), edges, color=colour, label=name)
            panel.set_title(kind)
            panel.set_axisbelow(True)
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter(lambda value, _: short(value))
            panel.yaxis.get_major_locator().set_params(integer=True)
            panel.set_ylabel("answers")
        panels[0].legend()
        panels[-1].set_xlabel("words of an answer")
        save_picture(figure, path, "--out")
