"""Reinforcement learning of a small model in this process: for all tests of the command."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.config import RunConfig
from dsv3_jax.grpo import main
from dsv3_jax.inference import programs as engine_programs
from dsv3_jax.posttrain import grpo_feed, grpo_finish
from dsv3_jax.posttrain.rollouts import Rollouts
from dsv3_jax.train import loop, scoring
from dsv3_jax.train import programs as train_programs
from dsv3_jax.train import run as train_run
from tests.inference.engines import programs_compiled_once
from tests.runs import TIMES, SmallRun, once_per_program, timeless
from tests.shapes import FAST_COMPILATION
from tests.tuning import Tuning

FLAGS = (
    *("--train.dtype", "float32", "--data.length", 32, "--train.steps", 4),
    *("--prompts-per-step", 2, "--group", 3, "--max-tokens", 6, "--updates", 2, "--kl", 0.1),
    *("--schedule.learning-rate", 1e-2, "--schedule.final-learning-rate", 1e-2),
    *("--output.eval-every", 50, "--output.save-every", 2, "--model.mtp-depth", 0),
)
REWARDS = ("--reward", "python:tests.own_rewards:early", "--reward", "length:2-6*0.25")


@dataclass(frozen=True)
class Reinforcing:
    """A model, prompts, and a way to start the command here."""

    home: Path

    @property
    def model(self) -> Path:
        return self.home / "model"

    @property
    def prompts(self) -> Path:
        return self.home / "prompts.jsonl"

    def make(self) -> None:
        """Of 5 prompts one is longer than rows have room for."""
        Tuning(self.home).make()
        asked = [f"{i}+{i % 7}" for i in range(4)] + ["1+" * 20]
        lines = (json.dumps({"prompt": text, "reference": "0"}) for text in asked)
        self.prompts.write_text("".join(f"{line}\n" for line in lines))

    def begin(self, out: Path, *args: object, rewards: tuple = REWARDS) -> int | None:
        """A new run in the folder `out`."""
        given = ("--init-from", self.model, "--prompts", self.prompts, *FLAGS, *rewards)
        return self.run("--output.folder", out, *given, *args)

    def run(self, *args: object, pictures: bool = False) -> int | None:
        """The command in this process."""
        with SmallRun(self.home).quick(pictures), _quick_answers():
            return main(list(map(str, args)))


ENGINES: dict[str, Rollouts] = {}


def _known_rollouts(cfg: RunConfig, *others: Any) -> Rollouts:
    """An engine of before, which takes each step's weights as a new one does."""
    key = repr((cfg.model, cfg.train.dtype, cfg.train.seed, *others[2:]))
    if key not in ENGINES:
        ENGINES[key] = Rollouts(cfg, *others)
    return ENGINES[key]


@contextmanager
def without_pictures() -> Iterator[None]:
    """Pages and pictures take longer than all else of a small run."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (loop, "tell_page"),
            (train_run, "tell_page"),
            (grpo_finish, "write_page"),
            (grpo_finish, "picture"),
        ):
            patch.setattr(module, name, lambda *args: None)
        yield


@contextmanager
def _quick_answers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_feed, "Rollouts", _known_rollouts)
        patch.setattr(engine_programs, "COMPILER_OPTIONS", FAST_COMPILATION)
        patch.setattr(train_programs, "make_scores", once_per_program(scoring.make_scores))
        with programs_compiled_once():
            yield


def told(run: Path) -> list[dict[str, Any]]:
    """The entries of a run's metrics without what a clock measured."""
    entries = timeless(run)
    for entry in entries:
        for name in ("seconds", "tokens_per_second"):
            entry.get("grpo", {}).pop(name, None)
    assert not any(name in entry for entry in entries for name in TIMES)
    return entries
