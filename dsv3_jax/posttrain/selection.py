"""From candidates to samples: which are kept, and why the others are not."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3_jax.posttrain.candidates import Entry
from dsv3_jax.posttrain.completions import Completion, with_reasoning
from dsv3_jax.posttrain.contamination import EvaluationTexts
from dsv3_jax.posttrain.duplicates import KeptTexts
from dsv3_jax.posttrain.journal import Key
from dsv3_jax.posttrain.problems import Problem
from dsv3_jax.posttrain.synthesis_options import Selection

# What becomes of a candidate, in the order in which it is asked for.
FATES = (
    "failed",
    "rejected",
    "rejected by a person",
    "contaminated",
    "duplicate",
    "near duplicate",
    "beyond --keep",
    "kept",
)


@dataclass(frozen=True)
class Candidate:
    """An entry of the journal and what it answers."""

    problem: Problem
    entry: Entry

    @property
    def answer(self) -> str:
        """The assistant's turn."""
        reasoning = self.entry["reasoning"] if self.problem.keeps_reasoning else None
        return with_reasoning(Completion(self.entry["text"], reasoning))

    @property
    def key(self) -> Key:
        """Its name in the journal."""
        return Key(self.problem.id, self.problem.kind, self.entry["candidate"])

    @property
    def said(self) -> str:
        """All turns but the system prompt, the last user's as the file has it: what duplicates have
        in common.
        """
        before = [one["content"] for one in self.problem.messages[:-1] if one["role"] != "system"]
        return "\n".join([*before, self.problem.prompt, self.answer])


@dataclass
class Selected:
    """What became of all candidates."""

    kept: list[Candidate] = field(default_factory=list)
    """Problem by problem, the preferred first"""
    accepted: list[Candidate] = field(default_factory=list)
    """By verifiers and people; among them those kept"""
    fates: dict[Key, str] = field(default_factory=dict)
    """One of FATES for each"""
    because: dict[Key, str] = field(default_factory=dict)
    """The kept sample or the evaluation text that it repeats, or who has rejected it and why"""


def candidates_of(problems: Iterable[Problem], entries: Mapping[Key, Entry]) -> list[Candidate]:
    """All of the journal, in the order of problems and numbers."""
    found: defaultdict[tuple[str, str], list[Entry]] = defaultdict(list)
    for key in sorted(entries, key=lambda key: key.number):
        found[key.id, key.kind].append(entries[key])
    return [Candidate(problem, entry) for problem in problems for entry in found[problem.key]]


def contaminated(problem: Problem, texts: EvaluationTexts, answer: str = "") -> str | None:
    """The evaluation text that a problem, or a sample of it, shows."""
    turns = [one["content"] for one in problem.messages if one["role"] != "system"]
    return texts.within(problem.prompt, [*turns, answer])


def select(
    candidates: Sequence[Candidate],
    how: Selection,
    texts: EvaluationTexts | None,
    reviews: Mapping[Key, Mapping[str, Any]],
) -> Selected:
    """Judges' verdicts, then people's, then contamination, duplicates and the most of a problem."""
    selected = Selected()
    left = [one for one in candidates if _is_accepted(one, reviews, selected)]
    selected.accepted = list(left)
    left = [one for one in left if not _is_contaminated(one, texts, selected)]
    if how.prefer == "shortest":
        places = {one.problem.key: place for place, one in reversed([*enumerate(left)])}
        left.sort(key=lambda one: (places[one.problem.key], len(one.answer)))
    for kind in dict.fromkeys(one.problem.kind for one in left):
        # Kind by kind: a problem's two samples may well have one answer.
        _keep([one for one in left if one.problem.kind == kind], how, selected)
    selected.kept = [one for one in left if selected.fates[one.key] == "kept"]
    return selected


def _is_accepted(
    one: Candidate, reviews: Mapping[Key, Mapping[str, Any]], selected: Selected
) -> bool:
    """A person has the last word on what verifiers let pass."""
    review = reviews.get(one.key, {})
    if "failed" in one.entry:
        fate, because = "failed", one.entry["failed"]
    elif one.entry["verification"]["verdict"] == "rejected":
        fate = "rejected"
        because = f"{one.entry['verifier']}: {one.entry['verification']['note']}"
    elif review.get("verdict") == "rejected":
        fate, because = "rejected by a person", review["note"]
    else:
        return True
    selected.fates[one.key], selected.because[one.key] = fate, because
    return False


def _is_contaminated(one: Candidate, texts: EvaluationTexts | None, selected: Selected) -> bool:
    shown = texts and contaminated(one.problem, texts, one.answer)
    if shown:
        selected.fates[one.key], selected.because[one.key] = "contaminated", shown
    return bool(shown)


def _keep(group: Sequence[Candidate], how: Selection, selected: Selected) -> None:
    """A candidate can only repeat what is kept: else both would be lost."""
    kept = KeptTexts([one.said for one in group], how.near_duplicates, how.near_ngram)
    counts: Counter[tuple[str, str]] = Counter()
    for place, one in enumerate(group):
        fate, of = "duplicate", kept.same(place)
        if of is None:
            fate, of = "near duplicate", kept.like(place)
        if of is not None:
            selected.because[one.key] = " ".join(map(str, group[of].key))
        elif counts[one.problem.key] == how.keep:
            fate = "beyond --keep"
        else:
            fate = "kept"
            counts[one.problem.key] += 1
            kept.keep(place)
        selected.fates[one.key] = fate


def sample_of(
    one: Candidate,
    file: Path,
    sampling: Mapping[str, Any],
    reviews: Mapping[Key, Mapping[str, Any]],
) -> dict[str, Any]:
    """What fine-tuning reads: messages, kind, verification, and where it all comes from."""
    problem, entry = one.problem, one.entry
    return {
        "messages": [*problem.messages, {"role": "assistant", "content": one.answer}],
        "kind": problem.kind,
        "verification": reviews.get(one.key, entry["verification"]),
        "provenance": {
            **entry["source"],
            "sampling": {**sampling, "seed": entry["seed"]} if entry["source"]["model"] else None,
            "template": dict(problem.template),
            "prompt": {"id": problem.id, "hash": entry["hash"], "file": str(file)},
            "candidate": entry["candidate"],
            "verifier": entry["verifier"],
            "verdict": entry["verification"]["verdict"],
            "tokens": entry["tokens"],
            "time": entry["time"],
            "version": entry["version"],
        },
    }
