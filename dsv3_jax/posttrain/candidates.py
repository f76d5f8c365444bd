"""Rejection sampling: some answers to every problem, each with its verdict (report 5.1).

A candidate's seed is a function of the command's seed, the problem and the candidate's number. So a
run that was killed goes on as if nothing had happened, in whatever order its answers came.
"""

import datetime
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from dsv3_jax import __version__
from dsv3_jax.config.fields import shown
from dsv3_jax.data.hashing import key64
from dsv3_jax.posttrain.completions import Ask, Completion, Failure, Source
from dsv3_jax.posttrain.journal import Journal, Key
from dsv3_jax.posttrain.problems import Problem
from dsv3_jax.posttrain.verifiers import Verifier, judged

Entry = dict[str, Any]


def seed_of(problem: Problem, number: int, seed: int) -> int:
    """0 to 2^32 - 1."""
    return key64(f"synthesis {problem.id} {problem.kind} {problem.hash}", seed, number) % 2**32


def keys_of(problem: Problem, candidates: int) -> list[Key]:
    """Of its candidates; a response that came with the problem is the only one."""
    count = candidates if problem.response is None else 1
    return [Key(problem.id, problem.kind, number) for number in range(count)]


def remaining(
    problems: Sequence[Problem], candidates: int, seed: int, known: Collection[Key]
) -> list[Ask]:
    """What is still to be asked, problem by problem; responses of the file are not."""
    return [
        Ask(problem, key.number, seed_of(problem, key.number, seed))
        for problem in problems
        if problem.response is None
        for key in keys_of(problem, candidates)
        if key not in known
    ]


def take_responses(
    problems: Sequence[Problem], judges: Sequence[Verifier], journal: Journal
) -> None:
    """The original responses of the file, as candidates."""
    for problem in problems:
        if problem.response is None or keys_of(problem, 1)[0] in journal.entries:
            continue
        ask, answer = Ask(problem, 0, 0), Completion(problem.response)
        source = {"model": None, "file": problem.where}
        journal.add(entry_of(ask, answer, judges, source))


def collect(
    asks: Sequence[Ask],
    source: Source,
    judges: Sequence[Verifier],
    journal: Journal,
    told: Callable[[Entry], None] = lambda entry: None,
) -> None:
    """Every answer goes to the journal as it comes, judged. Errors are those of the source and of
    the journal; what came before them is kept.
    """
    for ask, answer in source.answers(asks):
        entry = entry_of(ask, answer, judges, source.described)
        journal.add(entry)
        told(entry)


def entry_of(
    ask: Ask,
    answer: Completion | Failure,
    judges: Sequence[Verifier],
    source: Mapping[str, Any],
) -> Entry:
    """What the journal holds of a candidate."""
    problem = ask.problem
    entry = {
        "id": problem.id,
        "kind": problem.kind,
        "candidate": ask.number,
        "hash": problem.hash,
        "seed": ask.seed,
        "source": dict(source),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "version": __version__,
    }
    if isinstance(answer, Failure):
        return entry | {"failed": answer.reason}
    verdict, verifier = judged(problem, answer, judges)
    said = {"by": "none", "verdict": None, "note": ""}
    if verdict is not None:
        found = "accepted" if verdict.accepted else "rejected"
        said = {"by": verdict.by, "verdict": found, "note": verdict.note}
    return entry | {
        "text": answer.text,
        "reasoning": answer.reasoning,
        "tokens": answer.tokens,
        "verifier": verifier,
        "verification": said,
    }


# Types of an entry's fields, as `entry_of` writes them.
_TYPES = {"hash": str, "seed": int, "source": dict, "time": str, "version": str}
_ANSWERED = {
    "text": str,
    "reasoning": str | None,
    "tokens": int | None,
    "verifier": str | None,
    "verification": dict,
}
_SAID = {"by": str, "verdict": str | None, "note": str}


def check_entries(journal: Journal, name: str) -> None:
    """ValueError, one line, for an entry of the file `name` that is not as it was written."""
    for key, entry in journal.entries.items():
        if "failed" in entry:
            is_whole = _has(entry, _TYPES | {"failed": str})
        else:
            is_whole = _has(entry, _TYPES | _ANSWERED) and _has(entry["verification"], _SAID)
        if not (is_whole and "model" in entry["source"]):
            raise ValueError(
                f"{name}: candidate {key.number} of {shown(key.id)} was changed; allowed: what "
                "this command wrote"
            )


def _has(found: Mapping[str, Any], types: Mapping[str, Any]) -> bool:
    return all(name in found and isinstance(found[name], of) for name, of in types.items())
