"""What fine-tuning makes of a small model: letters said backwards, scored by exact match.

    python experiments/sft_tiny/run.py [--folder FOLDER]

Trains a model on source code, fine-tunes it on conversations by two recipes, and scores every
checkpoint on questions that none of them has seen. Minutes on two CPU cores.
"""

import json
import random
import string
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from curves import HERE, train

from dsv3_jax.checkpoint import store
from dsv3_jax.cli import parse, run, to_stderr, user_errors
from dsv3_jax.config.fields import check
from dsv3_jax.data.chat import ChatTemplate
from dsv3_jax.drawing import SERIES, new_figure
from dsv3_jax.evaluate.subject import Pair, Subject
from dsv3_jax.inference.opening import open_weights
from dsv3_jax.inference.options import EngineOptions

CONFIG = HERE / "sft_tiny" / "config.py"
LENGTHS = (3, 4)  # letters of a question


class Recipe(NamedTuple):
    """Learning rates of the first and the last step, and passes over the samples."""

    first: float
    last: float
    epochs: int

    def __str__(self) -> str:
        return f"{self.first:g} to {self.last:g}, {self.epochs} epochs"


RECIPES = {"report": Recipe(5e-6, 1e-6, 2), "tiny": Recipe(3e-3, 3e-4, 12)}


@dataclass(frozen=True)
class Options:
    """How long, and where the runs lie."""

    folder: Path = Path("runs/sft_tiny")
    """Of the runs"""
    samples: int = 2000
    """Conversations to learn from"""
    questions: int = 300
    """That are asked, of each length as many"""

    def __post_init__(self) -> None:
        for name in ("samples", "questions"):
            check(f"--{name}", getattr(self, name), getattr(self, name) >= 1, "1 or more")


Question = tuple[str, str]  # and its answer


def main(args: list[str]) -> None:
    """The command."""
    options = parse(Options, Options(), prog="run.py", description=__doc__, args=args)
    with user_errors():
        tell(options)


def tell(options: Options) -> None:
    """Trains what is missing, prints a table of exact matches and draws them by step."""
    base = train(options.folder, "base", config=CONFIG)
    learned, asked = divided(options.samples, options.questions)
    samples = options.folder.absolute() / "samples.jsonl"
    write(samples, learned)
    lines = [table_line("before", 0, scores(base, None, asked))]
    matches: dict[str, dict[int, float]] = {}
    for name, recipe in RECIPES.items():
        tuned = tune(options.folder, name, base, samples)
        found = {step: scores(tuned, step, asked) for step in store.steps(tuned / "checkpoints")}
        matches[name] = {step: mean(by_length) for step, by_length in found.items()}
        last = max(found)
        lines.append(table_line(f"after, {recipe}", last, found[last]))
    heads = " | ".join(f"{length} letters" for length in LENGTHS)
    print(f"| model | step | {heads} | all |\n|{' --- |' * (len(LENGTHS) + 3)}")
    print("\n".join(lines))
    draw(matches, options.folder / "matches.png")


# --- the task ------------------------------------------------------------------------------------


def divided(samples: int, questions: int) -> tuple[list[Question], list[Question]]:
    """Questions to learn from and questions to ask, all different, the same in every run."""
    draw = random.Random(0)
    found: dict[Question, None] = {}
    while len(found) < samples + questions:
        letters = draw.choices(string.ascii_lowercase, k=LENGTHS[len(found) % len(LENGTHS)])
        found.setdefault(question_of(letters))
    made = list(found)
    return made[questions:], made[:questions]


def question_of(letters: Sequence[str]) -> Question:
    """Letters apart from each other, so that each is a token, and the same backwards."""
    return " ".join(letters), " ".join(reversed(letters))


def write(file: Path, learned: Sequence[Question]) -> None:
    """As a user's file of conversations."""
    roles = "user", "assistant"
    records = (
        {"messages": [{"role": r, "content": c} for r, c in zip(roles, pair, strict=True)]}
        for pair in learned
    )
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))


# --- runs ----------------------------------------------------------------------------------------


def tune(runs: Path, name: str, base: Path, samples: Path) -> Path:
    """The folder of a finished fine-tuning. SystemExit if it ends early."""
    folder, recipe = runs.absolute() / name, RECIPES[name]
    done = folder / "sft-001"
    if not (done / "result.json").exists():
        words = [sys.executable, "-m", "dsv3_jax.sft", "--init-from", base, "--output.folder"]
        words += [folder, "--data.source", samples, "--epochs", recipe.epochs]
        words += ["--schedule.learning-rate", recipe.first]
        words += ["--schedule.final-learning-rate", recipe.last]
        words += ["--output.save-every", 50, "--output.eval-every", 100]
        print(f"== {name}", flush=True)
        ended = subprocess.run(list(map(str, words)), cwd=HERE.parent, check=False)
        if ended.returncode:
            raise SystemExit(ended.returncode)
    return done


def scores(of: Path, step: int | None, asked: Sequence[Question]) -> dict[int, float]:
    """By length, the share of questions whose answer is, token by token to its end, what the model
    would write greedily.
    """
    options = EngineOptions()
    opened = open_weights(of, options, step=step, dtype="float32")
    subject, template = Subject(opened, options), ChatTemplate(opened.folder.tokenizer)
    end = opened.folder.tokenizer.eos_id
    pairs = [
        Pair(
            template.encode([{"role": "user", "content": question}]),
            [*subject.encode(answer), end],
        )
        for question, answer in asked
    ]
    is_match = [is_greedy for _, is_greedy in subject.likelihoods(pairs)]
    to_stderr(f"{sum(is_match)} of {len(asked)} exact")
    return by_length(asked, is_match)


def by_length(asked: Sequence[Question], is_match: Sequence[bool]) -> dict[int, float]:
    """Shares of matches by number of letters."""
    found = {}
    for length in LENGTHS:
        chosen = [m for (q, _), m in zip(asked, is_match, strict=True) if len(q.split()) == length]
        found[length] = sum(chosen) / len(chosen)
    return found


def mean(shares: Mapping[int, float]) -> float:
    """Of all lengths, which are asked equally often."""
    return sum(shares.values()) / len(shares)


# --- what is shown -------------------------------------------------------------------------------


def table_line(name: str, step: int, shares: Mapping[int, float]) -> str:
    """In Markdown."""
    cells = " | ".join(f"{share:.1%}" for share in (*shares.values(), mean(shares)))
    return f"| {name} | {step:,} | {cells} |"


def draw(matches: Mapping[str, Mapping[int, float]], file: Path) -> None:
    """Exact matches by step of both fine-tunings."""
    with new_figure(7, 3.6) as figure:
        panel = figure.subplots()
        for (name, by_step), color in zip(matches.items(), SERIES, strict=False):
            label = str(RECIPES[name])
            shares = [100 * share for share in by_step.values()]
            panel.plot(list(by_step), shares, "o-", markersize=4, color=color, label=label)
        panel.set_title("Exact matches on new questions, %")
        panel.set_xlabel("step of fine-tuning")
        panel.set_ylim(-2, 102)
        panel.legend(title="learning rate")
        figure.savefig(file, format="png", dpi=110)


if __name__ == "__main__":
    run(main)
