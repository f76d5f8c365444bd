"""What an expert iteration is to do: statements, judges and settings, read before a model is opened
and checked against each other.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dsv3_jax.data.conversations import read_conversations
from dsv3_jax.posttrain.contamination import EvaluationTexts, read_evaluation_texts
from dsv3_jax.posttrain.duplicates import normalised
from dsv3_jax.posttrain.iteration_options import Keeping
from dsv3_jax.posttrain.problems import Messages, Problem, check_references, read_problems
from dsv3_jax.posttrain.selection import contaminated
from dsv3_jax.posttrain.setting_files import hash_of
from dsv3_jax.posttrain.synthesis_options import Sampling
from dsv3_jax.posttrain.templates import check_kind, read_templates
from dsv3_jax.posttrain.verifiers import Verifier, verifiers

TuneFrom = Literal["base", "last"]
Ask = Literal["all", "unsettled"]


@dataclass(frozen=True)
class Inputs:
    """What a user gives."""

    statements: Path
    checkpoint: Path
    verifiers: Sequence[str]
    held_out: Path | None = None
    samples: Path | None = None
    """Conversations that every fine-tuning reads too"""
    kind: str = "reasoning_original"
    """Of lines that name none"""
    templates: Path | None = None
    decontaminate: Sequence[Path] = ()
    rounds: int = 3
    attempts: int = 8
    """At each statement in each round"""
    ask: Ask = "all"
    tune_from: TuneFrom = "base"
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    keeping: Keeping = field(default_factory=Keeping)
    more: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the model and of its fine-tuning, by the names of options"""


@dataclass(frozen=True)
class Plan:
    """Inputs that have been read."""

    inputs: Inputs
    statements: list[Problem]
    """Those that are asked; the contaminated ones are not among them"""
    held_out: list[Problem]
    judges: list[Verifier]
    texts: EvaluationTexts | None
    examples: list[str]
    """Lines of JSON: the conversations of --samples"""
    known: set[str]
    """What these say, normalised as `said_by`"""
    skipped: int
    """Contaminated statements"""
    settings: Mapping[str, Any]
    """By the names of options"""


def read_plan(inputs: Inputs) -> Plan:
    """ValueError or OSError, one line, for a fault in any of it."""
    check_kind(inputs.kind, "--kind")
    templates = read_templates(inputs.templates)
    judges = verifiers(inputs.verifiers)

    def problems_of(file: Path) -> list[Problem]:
        found = read_problems(file, templates, inputs.kind, {})
        _check_problems(found, judges)
        return found

    statements = problems_of(inputs.statements)
    held_out = problems_of(inputs.held_out) if inputs.held_out else []
    texts = None
    if inputs.decontaminate:
        size = inputs.keeping.contamination_ngram
        texts = EvaluationTexts(read_evaluation_texts(inputs.decontaminate), size)
    asked = [one for one in statements if texts is None or contaminated(one, texts) is None]
    if not asked:
        raise ValueError(f"{inputs.statements}: --decontaminate leaves none of its statements")
    examples, learned = _examples(inputs.samples)
    _check_apart(held_out, asked, learned)
    return Plan(
        inputs,
        asked,
        held_out,
        judges,
        texts,
        examples,
        {said_by(messages) for messages in learned},
        len(statements) - len(asked),
        _settings(inputs, {one.kind: one.template["hash"] for one in statements}),
    )


def said_by(messages: Messages) -> str:
    """All turns but system prompts, normalised: what duplicates have in common."""
    return normalised("\n".join(one["content"] for one in messages if one["role"] != "system"))


def _check_problems(problems: Sequence[Problem], judges: Sequence[Verifier]) -> None:
    for problem in problems:
        if problem.response is not None:
            raise ValueError(f"{problem.where}: a response; allowed: what is to be answered")
        if not any(judge.kind in (None, problem.kind) for judge in judges):
            raise ValueError(f"{problem.where}: no --verifier judges the kind {problem.kind}")
    for judge in judges:
        judged = [one for one in problems if judge.kind in (None, one.kind)]
        if judge.needs_reference:
            check_references(judged, judge.name, judge.check_reference)


def _examples(file: Path | None) -> tuple[list[str], list[Messages]]:
    """Messages, as lines of JSON and as they are. ValueError, one line, for what is no
    conversation.
    """
    if file is None:
        return [], []
    kept = [list(one.messages) for one in read_conversations(str(file)) if not one.rejected]
    return [json.dumps({"messages": one}, ensure_ascii=False) for one in kept], kept


def _check_apart(
    held_out: Sequence[Problem], asked: Sequence[Problem], learned: Sequence[Messages]
) -> None:
    """ValueError for a held-out statement that fine-tuning may see."""
    seen = {said_by(one.messages): one.where for one in asked}
    for messages in learned:
        seen.setdefault(said_by(messages[:-1]), "in --samples")
    for problem in held_out:
        where = seen.get(said_by(problem.messages))
        if where:
            raise ValueError(
                f"{problem.where} is held out and stands {where}; allowed: in one of them"
            )


def _settings(inputs: Inputs, templates: Mapping[str, str]) -> dict[str, Any]:
    """All that decides what comes out, but for the number of rounds, which may grow."""
    found = {
        "--statements": hash_of(inputs.statements),
        "--held-out": inputs.held_out and hash_of(inputs.held_out),
        "--samples": inputs.samples and hash_of(inputs.samples),
        "--checkpoint": str(inputs.checkpoint.resolve()),
        "--verifier": list(inputs.verifiers),
        "--kind": inputs.kind,
        "--templates": dict(templates),
        "--decontaminate": [hash_of(file) for file in inputs.decontaminate],
        "--attempts": inputs.attempts,
        "--ask": inputs.ask,
        "--tune-from": inputs.tune_from,
        "--seed": inputs.seed,
        **inputs.more,
    }
    for options in (inputs.sampling, inputs.keeping):
        named = asdict(options)
        found.update({f"--{name.replace('_', '-')}": value for name, value in named.items()})
    return found
