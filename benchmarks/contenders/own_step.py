"""This project's float32 train step of `bench_cpu` as a contender, with one thing changed."""

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

import tyro
from contenders.contest_options import ContestOptions
from contenders.side_by_side import Contender, environment

from dsv3_jax.config.presets import bench_cpu


@dataclass(frozen=True)
class StepOptions(ContestOptions):
    """What a step is given, and how long it is measured."""

    torch_python: tyro.conf.Suppress[str | None] = None
    rows: int = 8
    """Rows of a step"""
    length: int = 512
    """Tokens of a row"""

    @property
    def pythons(self) -> tuple[str, ...]:
        return sys.executable, *self.python

    @property
    def sizes(self) -> str:
        return f"{self.rows} rows of {self.length} tokens"


def own_step(
    options: StepOptions, python: str, name: str, flags: str = "", **changes: Any
) -> Contender:
    """`changes` of what train_dsv3.py reads; `flags` are XLA's."""
    settings = environment(options.allocator)
    return Contender(
        name=name,
        group=f"interpreter {options.pythons.index(python) + 1}",
        python=python,
        script="train_dsv3.py",
        options={
            "rows": options.rows,
            "length": options.length,
            "warm_up": options.warm_up,
            "model": dataclasses.asdict(bench_cpu()),
            "dtype": "float32",
            "remat": "none",
            "recipe": "f32",
        }
        | changes,
        tokens=options.rows * options.length,
        environment=settings | ({"XLA_FLAGS": flags} if flags else {}),
    )
