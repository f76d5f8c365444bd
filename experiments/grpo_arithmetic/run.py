"""What rewards alone make of a small model that adds badly: sums of numbers below 100.

    python experiments/grpo_arithmetic/run.py [--folder FOLDER] [--steps N] [--seeds N]

Teaches a model sums of a teacher who mostly forgets to carry; goes on by rewards of its own answers
to other sums, whose answers it is never shown; and asks every checkpoint for sums that none has
seen. Minutes on two CPU cores.
"""

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from curves import HERE, train
from flax import nnx

from dsv3_jax.checkpoint import store
from dsv3_jax.checkpoint.model_folder import open_model
from dsv3_jax.cli import parse, run, to_stderr, user_errors
from dsv3_jax.config.fields import check
from dsv3_jax.config.load import load_json
from dsv3_jax.data.chat import ChatTemplate
from dsv3_jax.drawing import SERIES, new_figure
from dsv3_jax.model.router import RouterBias
from dsv3_jax.posttrain.rl_prompts import encode_prompts, read_prompts
from dsv3_jax.posttrain.rollouts import Drawing, Rollouts
from dsv3_jax.train.step import TrainState

OWN = HERE / "grpo_arithmetic"
TAUGHT, REWARDED, ASKED = 3000, 4000, 400  # sums; of 10,000 that there are
FORGOTTEN = 2 / 3  # of the sums that are taught: nothing is carried
LONGEST = 8  # tokens of an answer; a right one has at most 6
DRAWN = 8  # answers to a question, where they are drawn


@dataclass(frozen=True)
class Options:
    """How long, and where the runs lie."""

    folder: Path = Path("runs/grpo_arithmetic")
    """Of the runs"""
    epochs: int = 32
    """Passes over the sums that are taught"""
    steps: int = 200
    """Of each run by rewards"""
    seeds: int = 2
    """Runs by rewards"""
    learning_rate: float = 1e-4
    """Of the runs by rewards"""
    kl: float = 0.04
    """Weight of the divergence from the taught model"""

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "seeds"):
            check(f"--{name}", getattr(self, name), getattr(self, name) >= 1, "1 or more")


class Score(NamedTuple):
    """On the sums that are asked."""

    greedy: float
    """Share that is right, of the likeliest answers"""
    drawn: float
    """Of answers drawn at temperature 1, `DRAWN` to each"""
    any_drawn: float
    """Share of sums of which one of these is right"""


def main(args: list[str]) -> None:
    """The command."""
    options = parse(Options, Options(), prog="run.py", description=__doc__, args=args)
    with user_errors():
        tell(options)


def tell(options: Options) -> None:
    """Trains what is missing, prints a table, and writes a picture and the numbers."""
    folder = options.folder.absolute()
    write_tasks(folder)
    base = train(folder, "base", "--data.source", f"{folder}/sums-*.txt", config=OWN / "config.py")
    taught = teach(folder, base, options)
    scores = {"taught": {0: score(taught, None, folder)}}
    rewards = {}
    for seed in range(options.seeds):
        reinforced, name = reinforce(folder, taught, seed, options), f"seed {seed}"
        rewards[name] = rewards_of(reinforced)
        steps = store.steps(reinforced / "checkpoints")
        scores[name] = {step: score(reinforced, step, folder) for step in steps if step}
    print_table(scores, rewards)
    draw(scores, rewards, folder / "rewards.png")
    told = {
        "options": asdict(options) | {"folder": ""},
        "scores": {
            name: {step: found._asdict() for step, found in by_step.items()}
            for name, by_step in scores.items()
        },
        "rewards": rewards,
    }
    (folder / "results.json").write_text(f"{json.dumps(told)}\n")


# --- the task ------------------------------------------------------------------------------------


def write_tasks(folder: Path) -> None:
    """Sums to be taught as text and as conversations, to be rewarded for, and to be asked: all
    different, the same in every run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sums = [(a, b) for a in range(100) for b in range(100)]
    random.Random(0).shuffle(sums)
    pairs = [(f"{digits(a)} + {digits(b)} =", digits(a + b)) for a, b in sums]
    rest, draw = pairs[TAUGHT:], random.Random(1)
    taught = [
        (question, digits(without_carries(a, b)) if draw.random() < FORGOTTEN else answer)
        for (a, b), (question, answer) in zip(sums[:TAUGHT], pairs, strict=False)
    ]
    for part in range(8):
        lines = (f"{question} {answer}\n" for question, answer in taught[part::8])
        (folder / f"sums-{part}.txt").write_text("".join(lines))
    roles = "user", "assistant"
    conversations = (
        {"messages": [{"role": r, "content": c} for r, c in zip(roles, pair, strict=True)]}
        for pair in taught
    )
    write_lines(folder / "taught.jsonl", conversations)
    for name, part in (("prompts", rest[:REWARDED]), ("asked", rest[-ASKED:])):
        lines = ({"prompt": question, "reference": answer} for question, answer in part)
        write_lines(folder / f"{name}.jsonl", lines)


def without_carries(a: int, b: int) -> int:
    """What comes out for who forgets to carry: 37 + 85 is 12."""
    return (a // 10 + b // 10) % 10 * 10 + (a + b) % 10


def digits(number: int) -> str:
    """Apart from each other, so that each is a token."""
    return " ".join(str(number))


def write_lines(file: Path, records: Sequence[dict]) -> None:
    """As JSON Lines."""
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))


# --- runs ----------------------------------------------------------------------------------------


def teach(folder: Path, base: Path, options: Options) -> Path:
    """The folder of a finished fine-tuning."""
    words = ["--data.source", folder / "taught.jsonl", "--data.chat-template"]
    words += [OWN / "template.jinja", "--epochs", options.epochs]
    words += ["--schedule.learning-rate", 3e-3, "--schedule.final-learning-rate", 3e-4]
    words += ["--output.eval-every", 200, "--output.save-every", 1000]
    return finished(folder, "sft", "taught", base, words)


def reinforce(folder: Path, taught: Path, seed: int, options: Options) -> Path:
    """The folder of a finished run by rewards."""
    words = ["--prompts", folder / "prompts.jsonl", "--reward", "exact", "--kl", options.kl]
    words += ["--prompts-per-step", 16, "--group", 8, "--max-tokens", LONGEST]
    words += ["--train.steps", options.steps, "--train.seed", seed]
    words += ["--schedule.learning-rate", options.learning_rate]
    words += ["--schedule.final-learning-rate", options.learning_rate]
    words += ["--schedule.warmup-steps", 10]
    words += ["--output.save-every", 50, "--output.eval-every", 50]
    return finished(folder, "grpo", f"rewarded-{seed}", taught, words)


def finished(folder: Path, command: str, name: str, origin: Path, words: Sequence) -> Path:
    """The folder of a run of this name, made if there is none. SystemExit if it ends early."""
    done = folder / f"{name}-001"
    if not (done / "result.json").exists():
        start = ["--init-from", origin, "--output.folder", folder, "--output.name", name]
        words = [sys.executable, "-m", f"dsv3_jax.{command}", *start, *words]
        print(f"== {name}", flush=True)
        ended = subprocess.run(
            [*map(str, words), "--output.sample-tokens", "0"], cwd=HERE.parent, check=False
        )
        if ended.returncode:
            raise SystemExit(ended.returncode)
    return done


def rewards_of(reinforced: Path) -> list[float]:
    """Mean reward of every step's answers."""
    lines = (reinforced / "metrics.jsonl").read_text().splitlines()
    entries = [entry for entry in map(json.loads, lines) if entry["kind"] == "train"]
    return [entry["reward"] for entry in entries]


def score(of: Path, step: int | None, folder: Path) -> Score:
    """Of a checkpoint, on the sums that nobody has seen."""
    opened = open_model(of, dtype="float32", step=step)
    template = ChatTemplate.of_folder(of, opened.tokenizer)
    asked = encode_prompts(read_prompts(folder / "asked.jsonl"), template, 64)
    graphdef, *weights = nnx.split(opened.model, nnx.Param, RouterBias)
    shares = []
    for temperature, group in ((0.0, 1), (1.0, DRAWN)):
        drawing = Drawing(group, LONGEST, temperature, rows=128)
        rollouts = Rollouts(
            load_json(of / "config.json"),
            graphdef,
            opened.tokenizer,
            asked,
            drawing,
            opened.end_ids,
        )
        groups = rollouts.groups(TrainState(*weights, ()), range(len(asked.prompts)), batch=0)
        attempts = rollouts.attempts(groups)
        right = [attempt.text.strip() == attempt.reference for attempt in attempts]
        shares += [np.reshape(right, (-1, group))]
    found = Score(
        *(float(x) for x in (shares[0].mean(), shares[1].mean(), shares[1].any(1).mean()))
    )
    to_stderr(f"{of.name} {step or ''}: {found.greedy:.1%} greedy, {found.drawn:.1%} drawn")
    return found


# --- what is shown -------------------------------------------------------------------------------


def print_table(scores: dict[str, dict[int, Score]], rewards: dict[str, list[float]]) -> None:
    """In Markdown."""
    heads = "model", "step", "greedy", "drawn", f"any of {DRAWN}", "reward"
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for name, by_step in scores.items():
        for step, found in by_step.items():
            shares = " | ".join(f"{share:.1%}" for share in found)
            last = rewards.get(name, [])[max(step - 10, 0) : step]
            reward = f"{np.mean(last):.3f}" if last else ""
            print(f"| {name} | {step} | {shares} | {reward} |")


def draw(scores: dict[str, dict[int, Score]], rewards: dict[str, list[float]], file: Path) -> None:
    """Rewards by step, and what is right of new sums."""
    before = scores["taught"][0]
    with new_figure(9, 3.6) as figure:
        panels = figure.subplots(1, 2)
        for (name, found), color in zip(rewards.items(), SERIES, strict=False):
            mean = np.convolve(found, np.ones(10) / 10, "valid")
            panels[0].plot(range(10, len(found) + 1), mean, color=color, label=name)
            steps = {0: before} | scores[name]
            for style, kind in (("o-", "greedy"), ("o--", "drawn")):
                shares = [100 * getattr(one, kind) for one in steps.values()]
                label = f"{name}, {kind}"
                panels[1].plot(list(steps), shares, style, markersize=4, color=color, label=label)
        panels[0].set_title("Mean reward of the last 10 steps")
        panels[1].set_title("Right answers to new sums, %")
        for panel in panels:
            panel.set_xlabel("step of GRPO")
            panel.legend()
        figure.savefig(file, format="png", dpi=100)


if __name__ == "__main__":
    run(main)
