"""Pass rates of expert iteration: of attempts, of statements, and over all rounds so far.

A statement may stand there with its negation, whose id is `not ` and the statement's; it is settled
if either has an accepted attempt. pass@k is the chance that k attempts settle it, k for each side:
of n attempts of which c were accepted 1 - C(n - c, k) / C(n, k), which is without bias (Chen and
others 2021).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from dsv3_jax.posttrain.candidates import Entry
from dsv3_jax.posttrain.problems import Problem

NOT = "not "
Side = tuple[str, str]
"""The key of a problem"""


def sides_of(problems: Sequence[Problem]) -> dict[Side, list[Side]]:
    """Each statement with its negation, if there is one: by the statement's key both keys."""
    known = {problem.key for problem in problems}
    found: dict[Side, list[Side]] = {}
    for problem in problems:
        if not _is_negation(*problem.key, known):
            twin = twin_of(problem.key, known)
            found[problem.key] = [problem.key, *([twin] if twin else [])]
    return found


def twin_of(side: Side, known: Collection[Side]) -> Side | None:
    """The other one of a statement and its negation; None if it stands alone."""
    id_, kind = side
    other = id_.removeprefix(NOT) if _is_negation(id_, kind, known) else NOT + id_
    return (other, kind) if (other, kind) in known else None


def _is_negation(id_: str, kind: str, known: Collection[Side]) -> bool:
    return id_.startswith(NOT) and (id_.removeprefix(NOT), kind) in known


def is_accepted(entry: Entry) -> bool:
    """Whether verifiers have let it pass."""
    return "failed" not in entry and entry["verification"]["verdict"] == "accepted"


def pass_at(k: int, attempts: int, accepted: int) -> float:
    """The chance that k of the attempts hold an accepted one."""
    return 1 - math.comb(attempts - accepted, k) / math.comb(attempts, k)


def budgets(attempts: int) -> list[int]:
    """The k that are told: 1, 2, 4 and so on, and all attempts."""
    return [*(k for k in (2**n for n in range(20)) if k < attempts), attempts]


def pass_rates(
    statements: Mapping[Side, Sequence[Side]], entries: Iterable[Entry], attempts: int
) -> dict[str, Any]:
    """Of what was asked: counts, the share of attempts that were accepted, and pass@k."""
    asked, accepted = _counts(entries)
    chances: dict[int, list[float]] = {k: [] for k in budgets(attempts)}
    for sides in statements.values():
        tried = [side for side in sides if asked[side]]
        if tried:
            for k, found in chances.items():
                lost = (1 - pass_at(min(k, asked[s]), asked[s], accepted[s]) for s in tried)
                found.append(1 - math.prod(lost))
    total, passed = sum(asked.values()), sum(accepted.values())
    count = len(chances[attempts])
    return {
        "statements": count,
        "attempts": total,
        "accepted": passed,
        "share": passed / total if total else 0.0,
        "pass": {str(k): sum(found) / count if count else 0.0 for k, found in chances.items()},
    }


def _counts(entries: Iterable[Entry]) -> tuple[Counter[Side], Counter[Side]]:
    asked: Counter[Side] = Counter()
    accepted: Counter[Side] = Counter()
    for entry in entries:
        side = entry["id"], entry["kind"]
        asked[side] += 1
        accepted[side] += is_accepted(entry)
    return asked, accepted


def settled(
    statements: Mapping[Side, Sequence[Side]], passed: Collection[Side]
) -> dict[str, int | float]:
    """Statements that were proved and refuted so far, and both, which no sound verifier allows."""
    counts: defaultdict[str, int] = defaultdict(int)
    for statement, sides in statements.items():
        found = [side in passed for side in sides]
        counts["proved"] += statement in passed
        counts["refuted"] += any(found[1:])
        counts["both"] += len(found) == 2 and all(found)
        counts["settled"] += any(found)
    share = counts["settled"] / len(statements)
    return {name: counts[name] for name in ("proved", "refuted", "both")} | {"cumulative": share}
