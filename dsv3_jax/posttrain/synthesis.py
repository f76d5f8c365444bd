"""Samples for fine-tuning, from prompts to a report: rejection sampling, then selection
(report 5.1).

The report has R1 and experts of each domain write the answers and keeps the good ones; it gives no
counts, prompts or thresholds, so these are options.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsv3_jax.cli import to_stderr
from dsv3_jax.files import replace_file
from dsv3_jax.posttrain.candidates import (
    Entry,
    check_entries,
    collect,
    remaining,
    take_responses,
)
from dsv3_jax.posttrain.completions import Source
from dsv3_jax.posttrain.contamination import EvaluationTexts, read_evaluation_texts
from dsv3_jax.posttrain.journal import Journal, Key
from dsv3_jax.posttrain.problems import Problem, check_references, read_problems
from dsv3_jax.posttrain.reviews import read_reviews
from dsv3_jax.posttrain.sample_statistics import staged, statistics
from dsv3_jax.posttrain.selection import (
    Selected,
    candidates_of,
    contaminated,
    sample_of,
    select,
)
from dsv3_jax.posttrain.setting_files import hash_of
from dsv3_jax.posttrain.synthesis_folder import (
    ASKING,
    FATES_FILE,
    JOURNAL,
    SELECTING,
    SynthesisFolder,
)
from dsv3_jax.posttrain.synthesis_options import Sampling, Selection
from dsv3_jax.posttrain.synthesis_report import write_report
from dsv3_jax.posttrain.templates import check_kind, read_templates
from dsv3_jax.posttrain.verifiers import Verifier, verifiers

Progress = Callable[[int], AbstractContextManager[Callable[[Entry], None]]]


@dataclass(frozen=True)
class Inputs:
    """What a user gives."""

    prompts: Path
    kind: str | None = None
    """Of lines that name none"""
    templates: Path | None = None
    values: Mapping[str, str] | None = None
    """For all templates"""
    verifiers: Sequence[str] = ()
    decontaminate: Sequence[Path] = ()
    reviewed: Path | None = None
    candidates: int = 4
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    selection: Selection = field(default_factory=Selection)
    model: Mapping[str, Any] | None = None
    """What names the model, by the names of options; `--step` may be None: the newest"""


@dataclass(frozen=True)
class Work:
    """What is to be done."""

    prompts: Path
    problems: list[Problem]
    """Those that are asked; the contaminated ones are not among them"""
    skipped: Mapping[tuple[str, str], str]
    """Contaminated problems, by their keys, and the evaluation text that each shows"""
    judges: list[Verifier]
    texts: EvaluationTexts | None
    reviews: Mapping[Key, Mapping[str, Any]]
    sampling: Sampling
    selection: Selection
    candidates: int
    seed: int
    settings: Mapping[str, Mapping[str, Any]]
    """By the names of options: those that decide what is asked, and those that select"""


def read_work(inputs: Inputs) -> Work:
    """Reads all that the user gives. ValueError or OSError, one line, for a fault in any of it."""
    if inputs.kind is not None:
        check_kind(inputs.kind, "--kind")
    templates = read_templates(inputs.templates)
    judges = verifiers(inputs.verifiers)
    problems = read_problems(inputs.prompts, templates, inputs.kind, inputs.values or {})
    for judge in judges:
        if judge.needs_reference:
            judged = [one for one in problems if judge.kind in (None, one.kind)]
            check_references(judged, judge.name, judge.check_reference)
    texts = None
    if inputs.decontaminate:
        size = inputs.selection.contamination_ngram
        texts = EvaluationTexts(read_evaluation_texts(inputs.decontaminate), size)
    shown = {one.key: texts and contaminated(one, texts) for one in problems}
    asked = [one for one in problems if shown[one.key] is None]
    return Work(
        inputs.prompts,
        asked,
        {key: text for key, text in shown.items() if text is not None},
        judges,
        texts,
        read_reviews(inputs.reviewed),
        inputs.sampling,
        inputs.selection,
        inputs.candidates,
        inputs.seed,
        _settings(inputs, problems),
    )


def _settings(inputs: Inputs, problems: Sequence[Problem]) -> dict[str, dict[str, Any]]:
    asking = {
        "--prompts": hash_of(inputs.prompts),
        "--kind": inputs.kind,
        "--templates": {one.kind: one.template["hash"] for one in problems},
        "--value": dict(inputs.values or {}),
        "--verifier": list(inputs.verifiers),
        "--candidates": inputs.candidates,
        "--seed": inputs.seed,
        **(inputs.model or {}),
    }
    selecting = {
        "--decontaminate": [hash_of(file) for file in inputs.decontaminate],
        "--reviewed": inputs.reviewed and hash_of(inputs.reviewed),
    }
    for half, options in ((asking, inputs.sampling), (selecting, inputs.selection)):
        named = asdict(options)
        half.update({f"--{name.replace('_', '-')}": value for name, value in named.items()})
    return {ASKING: asking, SELECTING: selecting}


def synthesise(
    work: Work,
    folder: SynthesisFolder,
    open_source: Callable[[int | None], Source],
    progress: Progress,
    reselect: bool = False,
) -> dict[str, Any]:
    """Asks for what the journal lacks, selects, and writes samples and report. Returns the
    statistics.

    `open_source`, of a step, is called if there is anything to ask; a run that goes on keeps its
    step. `reselect`: settings that select may differ from those before. Errors are those of the
    folder and of the source; what was answered before is kept.
    """
    settings = _settled(work.settings, folder, reselect)
    folder.check_samples()
    source = None
    if folder.stored is None and remaining(work.problems, work.candidates, work.seed, ()):
        source = open_source(settings[ASKING]["--step"])
        settings[ASKING]["--step"] = source.described.get("step")
    folder.write_settings(settings)
    with closing(Journal(folder.path / JOURNAL)) as journal:
        if journal.torn:
            to_stderr(f"{folder.path / JOURNAL}: a torn last line was cut off")
        check_entries(journal, str(folder.path / JOURNAL))
        take_responses(work.problems, work.judges, journal)
        asks = remaining(work.problems, work.candidates, work.seed, journal.entries)
        if asks:
            source = source or open_source(settings[ASKING]["--step"])
            with progress(len(asks)) as told:
                collect(asks, source, work.judges, journal, told)
        entries = journal.entries
    return _finish(work, folder, entries)


def _settled(
    wanted: Mapping[str, Mapping[str, Any]], folder: SynthesisFolder, reselect: bool
) -> dict[str, dict[str, Any]]:
    """With the step that a run was begun with. ValueError if another setting differs."""
    settings = {half: dict(wanted[half]) for half in (ASKING, SELECTING)}
    before = (folder.stored or {}).get(ASKING, {}).get("--step")
    if settings[ASKING].setdefault("--step", None) is None:
        settings[ASKING]["--step"] = before
    if folder.stored is not None:
        folder.check(settings, reselect)
    return settings


def _finish(work: Work, folder: SynthesisFolder, entries: Mapping[Key, Entry]) -> dict[str, Any]:
    candidates = candidates_of(work.problems, entries)
    selected = select(candidates, work.selection, work.texts, work.reviews)
    folder.write_samples(_samples(work, selected))
    replace_file(folder.path / FATES_FILE, _fates(work, selected))
    skipped = len(work.skipped)
    found = statistics(candidates, selected, len(work.problems) + skipped, skipped)
    settings = {**folder.stored[ASKING], **folder.stored[SELECTING]}
    write_report(folder.path, found, settings, staged(candidates, selected))
    return found


def _fates(work: Work, selected: Selected) -> bytes:
    """What became of each candidate, and of problems that were not asked, and because of what."""
    lines = [
        {"id": id_, "kind": kind, "candidate": None, "fate": "contaminated", "because": text}
        for (id_, kind), text in work.skipped.items()
    ]
    for key, fate in selected.fates.items():
        named = {"id": key.id, "kind": key.kind, "candidate": key.number, "fate": fate}
        lines.append(named | {"because": selected.because.get(key)})
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def _samples(work: Work, selected: Selected) -> bytes:
    sampling = asdict(work.sampling)
    made = (sample_of(one, work.prompts, sampling, work.reviews) for one in selected.kept)
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in made).encode()
