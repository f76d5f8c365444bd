"""Counts, lengths and formats of texts, exactly: of all candidates, of those accepted and kept."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from dsv3_jax.posttrain.duplicates import words
from dsv3_jax.posttrain.formats import FORMATS
from dsv3_jax.posttrain.selection import FATES, Candidate, Selected

STAGES = ("candidates", "accepted", "kept")


def lengths(values: Sequence[float]) -> dict[str, float] | None:
    """Of one number or more; percentiles are by the nearest rank, so each is one of them."""
    if not values:
        return None
    ranked = sorted(values)

    def percentile(share: int) -> int:
        return ranked[math.ceil(share * len(ranked) / 100) - 1]

    return {
        "count": len(ranked),
        "total": sum(ranked),
        "mean": sum(ranked) / len(ranked),
        "least": ranked[0],
        "p50": percentile(50),
        "p90": percentile(90),
        "p99": percentile(99),
        "most": ranked[-1],
    }


def of_texts(texts: Sequence[str], tokens: Sequence[int]) -> dict[str, Any]:
    """Lengths of texts in characters, words and (where counted) tokens, and how many have each
    format.
    """
    return {
        "count": len(texts),
        "characters": lengths([len(text) for text in texts]),
        "words": lengths([len(words(text)) for text in texts]),
        "tokens": lengths(tokens),
        "formats": {name: sum(map(has, texts)) for name, has in FORMATS.items()},
    }


def _of_candidates(candidates: Sequence[Candidate]) -> dict[str, Any]:
    counted = [one.entry["tokens"] for one in candidates if one.entry["tokens"] is not None]
    return of_texts([one.answer for one in candidates], counted)


def statistics(
    candidates: Sequence[Candidate], selected: Selected, num_problems: int, skipped: int
) -> dict[str, Any]:
    """All that a report tells: what became of the candidates, and texts before and after, for all
    kinds together and each alone. `skipped` of the problems were contaminated and not asked.
    """
    stages = staged(candidates, selected)
    fates = Counter(selected.fates.values())
    return {
        "problems": num_problems,
        "problems contaminated": skipped,
        "problems with a sample": len({one.problem.key for one in selected.kept}),
        "candidates": len(candidates),
        "fates": {fate: fates[fate] for fate in FATES},
        "rejections": dict(_rejections(candidates).most_common(20)),
        "failures": dict(_failures(candidates).most_common(20)),
        "texts": {
            kind: {stage: _of_candidates(_of(kind, stages[stage])) for stage in STAGES}
            for kind in ("all", *dict.fromkeys(one.problem.kind for one in candidates))
        },
    }


def staged(candidates: Sequence[Candidate], selected: Selected) -> dict[str, list[Candidate]]:
    """Candidates with a text, accepted, kept."""
    answered = [one for one in candidates if "failed" not in one.entry]
    return dict(zip(STAGES, (answered, selected.accepted, selected.kept), strict=True))


def _of(kind: str, candidates: Iterable[Candidate]) -> list[Candidate]:
    return [one for one in candidates if kind in ("all", one.problem.kind)]


def _rejections(candidates: Iterable[Candidate]) -> Counter[str]:
    """By verifier; notes say what each one found, and are in the journal."""
    rejected = (one.entry for one in candidates if "failed" not in one.entry)
    return Counter(
        entry["verifier"] for entry in rejected if entry["verification"]["verdict"] == "rejected"
    )


def _failures(candidates: Iterable[Candidate]) -> Counter[str]:
    return Counter(one.entry["failed"] for one in candidates if "failed" in one.entry)
