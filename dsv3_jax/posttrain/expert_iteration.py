"""Expert iteration: generate, verify, keep, fine-tune, repeat, as DeepSeek-Prover was made
(arXiv 2405.14333; the V3 report does not mention it).

In each round a model makes some attempts at every statement, and at its negation where the file has
one; what verifiers accept joins the data set; the base or the last model is fine-tuned on all of it
and makes the next round's attempts. Prover-V1 adds steps of its own that are left out: it writes
its statements itself and filters them by a model's score.

Attempts are numbered over all rounds, and an attempt's seed is a function of the command's seed,
the statement and its number. What a round does follows from the journals before it. So a run that
was killed anywhere goes on as if nothing had happened.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_jax.cli import to_stderr
from dsv3_jax.files import replace_file
from dsv3_jax.posttrain.candidates import Entry, collect, seed_of
from dsv3_jax.posttrain.completions import Ask, Completion, Failure, Source
from dsv3_jax.posttrain.duplicates import normalised
from dsv3_jax.posttrain.iteration_folder import (
    CANDIDATES,
    DATA,
    HELD_OUT,
    RUN,
    SAMPLES,
    IterationFolder,
    runs_of,
)
from dsv3_jax.posttrain.iteration_plan import Plan
from dsv3_jax.posttrain.iteration_report import write_report
from dsv3_jax.posttrain.iteration_statistics import (
    Side,
    is_accepted,
    pass_rates,
    settled,
    sides_of,
    twin_of,
)
from dsv3_jax.posttrain.journal import Journal, Key
from dsv3_jax.posttrain.problems import Problem
from dsv3_jax.posttrain.selection import FATES, Candidate, candidates_of, sample_of, select
from dsv3_jax.posttrain.verifiers import Verifier

Told = Callable[[Entry], None]


class Means(NamedTuple):
    """What the loop works with."""

    judges: Sequence[Verifier]
    open_source: Callable[[Path], Source]
    """Of a checkpoint; called if there is anything to ask"""
    tune: Callable[[Sequence[str]], int]
    """`sft`, with its arguments; returns the exit code"""
    tuning: Sequence[str] = ()
    """The user's arguments for it"""
    progress: Callable[[str, int], AbstractContextManager[Told]] | None = None
    """Of a stage and its number of attempts"""
    say: Callable[[str], None] = to_stderr


@dataclass
class _State:
    """What the rounds so far have come to."""

    model: Path
    """That makes the next attempts"""
    source: Source | None = None
    """The same, once it is open"""
    kept: list[Candidate] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    """The data set, as JSON"""
    passed: set[Side] = field(default_factory=set)
    """With an accepted attempt"""
    rounds: list[dict[str, Any]] = field(default_factory=list)
    """What the report tells of each, round 0 the held-out statements alone"""


def iterate(plan: Plan, folder: IterationFolder, means: Means) -> int:
    """All rounds, as far as they are not done. Returns 0, or the exit code of a fine-tuning that
    ended early: the same call goes on.

    ValueError for a folder that was begun with other settings; errors of the source, of the journal
    and of the disk pass, and what came before them is kept.
    """
    folder.settle(plan.settings)
    state = _State(plan.inputs.checkpoint)
    state.rounds.append({"round": 0, "held out": _measure(plan, folder, means, state, 0)})
    for number in range(1, plan.inputs.rounds + 1):
        place = folder.round(number)
        record = _attempt(plan, folder, means, state, number)
        code, record["tuned"] = _tune(plan, place, means, state, record["new samples"])
        if code:
            return code
        if record["tuned"]:
            record["held out"] = _measure(plan, folder, means, state, number)
        state.rounds.append(record)
        write_report(folder.path, state.rounds, plan.settings, plan.skipped)
        means.say(_told(record))
    return 0


# --- generate and verify -------------------------------------------------------------------------


def _attempt(
    plan: Plan, folder: IterationFolder, means: Means, state: _State, number: int
) -> dict[str, Any]:
    """A round's attempts, and what of them joins the data set."""
    asked = list(_asked(plan, state))
    first = (number - 1) * plan.inputs.attempts
    asks = _asks(plan, asked, range(first, first + plan.inputs.attempts))
    entries = _entries(asks, folder.round(number) / CANDIDATES, means, state, number)
    fates, new = _keep(plan, state, entries)
    _write_samples(plan, folder, state, number, new)
    state.passed |= {(one["id"], one["kind"]) for one in entries.values() if is_accepted(one)}
    statements = sides_of(plan.statements)
    return {
        "round": number,
        "model": _model_of(entries),
        **pass_rates(statements, entries.values(), plan.inputs.attempts),
        **settled(statements, state.passed),
        "fates": {fate: fates[fate] for fate in FATES if fates[fate]},
        "new samples": len(new),
        "samples": len(state.lines),
    }


def _asked(plan: Plan, state: _State) -> Iterator[Problem]:
    """Nobody tries to prove what was refuted, nor, with `unsettled`, what was proved."""
    known = {one.key for one in plan.statements}
    for problem in plan.statements:
        is_done = plan.inputs.ask == "unsettled" and problem.key in state.passed
        if not is_done and twin_of(problem.key, known) not in state.passed:
            yield problem


def _asks(plan: Plan, problems: Sequence[Problem], numbers: Sequence[int]) -> list[Ask]:
    return [
        Ask(problem, number, seed_of(problem, number, plan.inputs.seed))
        for problem in problems
        for number in numbers
    ]


def _entries(
    asks: Sequence[Ask], file: Path, means: Means, state: _State, number: int
) -> dict[Key, Entry]:
    """Of a journal, once it lacks nothing."""
    with closing(Journal(file)) as journal:
        if journal.torn:
            means.say(f"{file}: a torn last line was cut off")
        left = [ask for ask in asks if Key(*ask.problem.key, ask.number) not in journal.entries]
        if left:
            state.source = state.source or means.open_source(state.model)
            source = _OfRound(state.source, number)
            stage = f"round {number}, {file.stem.replace('_', '-')}"
            if means.progress is None:
                collect(left, source, means.judges, journal)
            else:
                with means.progress(stage, len(left)) as told:
                    collect(left, source, means.judges, journal, told)
        return journal.entries


class _OfRound:
    """A source whose answers are of a round."""

    def __init__(self, source: Source, number: int) -> None:
        self._source = source
        self.described: Mapping[str, Any] = {**source.described, "round": number}

    def answers(self, asks: Sequence[Ask]) -> Iterator[tuple[Ask, Completion | Failure]]:
        yield from self._source.answers(asks)


def _model_of(entries: Mapping[Key, Entry]) -> dict[str, Any] | None:
    """Which model has made a round's attempts; None if there was nothing to attempt."""
    source = next((entry["source"] for entry in entries.values()), None)
    return source and {"model": source["model"], "step": source.get("step")}


def _measure(
    plan: Plan, folder: IterationFolder, means: Means, state: _State, number: int
) -> dict[str, Any] | None:
    """What the model makes of held-out statements: the same attempts, by their seeds, each time."""
    if not plan.held_out:
        return None
    asks = _asks(plan, plan.held_out, range(plan.inputs.attempts))
    entries = _entries(asks, folder.round(number) / HELD_OUT, means, state, number)
    return pass_rates(sides_of(plan.held_out), entries.values(), plan.inputs.attempts)


# --- keep ----------------------------------------------------------------------------------------


def _keep(
    plan: Plan, state: _State, entries: Mapping[Key, Entry]
) -> tuple[Counter[str], list[Candidate]]:
    """What became of a round's attempts, and the new samples; those of before stay, and come first
    where two say the same.
    """
    here = candidates_of(plan.statements, entries)
    again = {one.key for one in here if plan.known and normalised(one.said) in plan.known}
    fresh = [one for one in here if one.key not in again]
    selected = select([*state.kept, *fresh], plan.inputs.keeping.selection(), plan.texts, {})
    before = {one.key for one in state.kept}
    new = [one for one in selected.kept if one.key not in before]
    assert len(new) + len(before) == len(selected.kept), "a kept sample stays"
    state.kept = [*state.kept, *new]
    fates = Counter(fate for key, fate in selected.fates.items() if key not in before)
    return fates + Counter({"duplicate": len(again)}), new


def _write_samples(
    plan: Plan, folder: IterationFolder, state: _State, number: int, new: Sequence[Candidate]
) -> None:
    """The new ones, the data set, and what is fine-tuned on."""
    sampling = asdict(plan.inputs.sampling)
    made = (sample_of(one, plan.inputs.statements, sampling, {}) for one in new)
    lines = [json.dumps(one, ensure_ascii=False) for one in made]
    state.lines += lines
    place = folder.round(number)
    for file, content in (
        (place / SAMPLES, lines),
        (folder.path / SAMPLES, state.lines),
        (place / DATA, [*plan.examples, *state.lines]),
    ):
        data = "".join(f"{line}\n" for line in content).encode()
        if not file.exists() or file.read_bytes() != data:
            replace_file(file, data)


# --- fine-tune -----------------------------------------------------------------------------------


def _tune(plan: Plan, place: Path, means: Means, state: _State, new: int) -> tuple[int, bool]:
    """Makes the round's model, if there is anything new to learn. Returns an exit code, and whether
    there is a model.
    """
    ended, begun = runs_of(place)
    asked = {one.problem.prompt for one in state.kept}
    if not new or (len(asked) < 2 and not plan.examples):  # one to train on, one to hold out
        return 0, False
    if ended is None:
        base = plan.inputs.checkpoint if plan.inputs.tune_from == "base" else state.model
        words = ["--resume", str(begun)]
        if begun is None:
            words = ["--init-from", str(base), "--data.source", str(place / DATA)]
            words += ["--output.folder", str(place), "--output.name", RUN, *means.tuning]
        state.source = None  # training needs its memory
        code = means.tune(words)
        if code:
            return code, False
        ended, _ = runs_of(place)
        assert ended is not None, f"{place}: a fine-tuning that ended well has a result"
    state.model, state.source = ended, None
    return 0, True


def _told(record: Mapping[str, Any]) -> str:
    """A round in a line."""
    most = max(record["pass"], key=int)
    line = (
        f"round {record['round']}: {record['accepted']:,} of {record['attempts']:,} attempts "
        f"accepted; pass@1 {record['pass']['1']:.1%}, pass@{most} {record['pass'][most]:.1%}; "
        f"settled so far {record['cumulative']:.1%}; {record['new samples']:,} new samples, "
        f"{record['samples']:,} in all"
    )
    held_out = record.get("held out")
    if held_out:
        line += f"; held out after it: pass@1 {held_out['pass']['1']:.1%}"
    if record["both"]:
        line += (
            f"; {record['both']:,} statements are proved and refuted: a verifier is wrong, or "
            "their premises contradict each other"
        )
    return line + ("" if record["tuned"] else "; not fine-tuned, since there is too little new")
