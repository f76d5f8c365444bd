"""Runs of loss_free_balancing's configuration, which three experiments share."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from curves import HERE, Options, train

CONFIG = HERE / "loss_free_balancing" / "config.py"
RUNS = Options(Path("runs/balancing"))

T = TypeVar("T")


class Variant(NamedTuple):
    """What a run differs by, and the seeds that it is trained with; pictures show the first."""

    options: tuple[str, ...]
    seeds: tuple[int, ...]


def balanced_by(bias_speed: float, balance_weight: float) -> tuple[str, ...]:
    """Options of a run: speed of the routers' bias, alpha of the sequence-wise loss."""
    speed, weight = f"{bias_speed:g}", f"{balance_weight:g}"
    return "--schedule.bias-speed", speed, "--train.balance-weight", weight


BALANCING = {
    "none": Variant(balanced_by(0, 0), (0,)),
    "aux_0.01": Variant(balanced_by(0, 1e-2), (0, 1)),
    "loss_free": Variant(balanced_by(3e-3, 1e-4), (0, 1)),
}


def trained_runs(folder: Path, variants: Mapping[str, Variant]) -> dict[tuple[str, int], Path]:
    """Folders of the runs by variant and seed; what is missing is trained."""
    return {
        (name, seed): train(
            folder,
            f"{name}_seed{seed}" if seed else name,
            *variant.options,
            "--train.seed",
            str(seed),
            config=CONFIG,
        )
        for name, variant in variants.items()
        for seed in variant.seeds
    }


def first_seeds(found: Mapping[tuple[str, int], T]) -> dict[str, T]:
    """What belongs to the first seed of each variant."""
    first = {}
    for (name, _), of in found.items():
        first.setdefault(name, of)
    return first
