"""Expert iteration without weights: proofs that a scripted model writes, and a fine-tuning that
leaves a run's folder.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3_jax.posttrain.completions import Ask, Completion
from dsv3_jax.posttrain.expert_iteration import Means, iterate
from dsv3_jax.posttrain.iteration_folder import iteration_folder
from dsv3_jax.posttrain.iteration_plan import Inputs, Plan, read_plan
from tests.posttrain.scripted_models import ScriptedModel, write_lines

# Of each statement a proof, and what else holds: `not c` has one, `c` has none.
STATEMENTS = {
    "a": "p, q |- p & q",
    "b": "p & q |- q",
    "c": "p, ~q |- p & q",
    "not c": "p, ~q |- ~(p & q)",
    "d": "p |- q",
}
PROOFS = {
    "a": "3. p & q by and_intro 1 2",
    "b": "2. q by and_right 1",
    "not c": "3. ~(p & q) by not_and_right 2",
    "h": "2. p | q by or_left 1",
}
HELD_OUT = {"h": "p |- p | q", "i": "|- false"}


def statements_of(folder: Path, statements: dict[str, str], name: str = "s.jsonl") -> Path:
    lines = [{"id": i, "prompt": f"{s}?", "reference": s} for i, s in statements.items()]
    return write_lines(folder / name, *lines)


def plan_of(folder: Path, **changes: Any) -> Plan:
    """Of STATEMENTS, two attempts at each, two rounds."""
    inputs = {
        "statements": statements_of(folder, STATEMENTS),
        "held_out": statements_of(folder, HELD_OUT, "h.jsonl"),
        "checkpoint": folder / "base",
        "verifiers": ["proof"],
        "rounds": 2,
        "attempts": 2,
    }
    return read_plan(Inputs(**inputs | changes))


def proof(ask: Ask, number: int) -> str:
    """The known one; each number has some of its own, longer ones."""
    text = PROOFS.get(ask.problem.id, "1. r by magic")
    for _ in range(number):
        *_, last = text.split("\n")
        head, _, rest = last.partition(". ")
        formula, _, _ = rest.rpartition(" by ")
        text += f"\n{int(head) + 1}. {formula} by copy {head}"
    return text


def grows(model: str, ask: Ask) -> Completion:
    """The base knows b alone, half of the time; whoever was fine-tuned knows all."""
    if model == "base" and (ask.problem.id != "b" or ask.number % 2):
        return Completion(f"1. {model} by nothing", tokens=3)
    return Completion(proof(ask, ask.number // 2), tokens=5)


@dataclass
class Workshop:
    """Its models and what was asked of them and of the fine-tuning."""

    plan: Plan
    out: Path
    says: Callable[[str, Ask], Completion] = grows
    tuned: list[list[str]] = field(default_factory=list)
    asked: list[tuple[str, str, int]] = field(default_factory=list)
    """Model, statement and number"""
    said: list[str] = field(default_factory=list)
    code: int = 0
    """Of the fine-tuning"""
    tuning: Sequence[str] = ()

    def open(self, checkpoint: Path) -> ScriptedModel:
        name = "base" if checkpoint.name == "base" else checkpoint.parent.name

        def says(ask: Ask) -> Completion:
            self.asked.append((name, ask.problem.id, ask.number))
            return self.says(name, ask)

        described = {"model": name, "checkpoint": str(checkpoint), "step": 7}
        return ScriptedModel(says, described)

    def tune(self, words: Sequence[str]) -> int:
        """As sft: a folder, a configuration, and at the end a result."""
        self.tuned.append(list(words))
        given = dict(zip(words[::2], words[1::2], strict=True))
        if "--resume" in given:
            run = Path(given["--resume"])
        else:
            run = Path(given["--output.folder"]) / f"{given['--output.name']}-001"
            run.mkdir(exist_ok=True)
            (run / "config.json").write_text(given["--data.source"])
        assert Path((run / "config.json").read_text()).read_text()
        if self.code:
            return self.code
        (run / "result.json").write_text("{}")
        return 0

    def run(self) -> int:
        means = Means(self.plan.judges, self.open, self.tune, self.tuning, say=self.said.append)
        with iteration_folder(self.out) as folder:
            return iterate(self.plan, folder, means)

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / name).read_text().splitlines()]

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.out / "report.json").read_text())


def timeless(out: Path) -> dict[str, Any]:
    """All that lies in a folder, but for times and the folder's own name."""
    found = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file() and p.suffix != ".png"):
        text = path.read_text().replace(str(out), "out")
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in text.splitlines()]
            for line in lines:
                line.get("provenance", line).pop("time", None)
            text = lines
        found[str(path.relative_to(out))] = text
    return found
