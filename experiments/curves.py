"""Runs of experiments, which differ from each other in a few options: made, and their loss curves
read and compared.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dsv3_jax.cli import parse, user_errors
from dsv3_jax.config import RunConfig
from dsv3_jax.config.load import load_json
from dsv3_jax.train.__main__ import resolve

HERE = Path(__file__).parent
CONFIG = HERE / "fp8_vs_bf16" / "config.py"
FADING = 0.9  # of the running mean (report, appendix B.1)


@dataclass(frozen=True)
class Options:
    """Where the runs lie."""

    folder: Path = Path("runs/fp8_vs_bf16")
    """Of the runs"""


def command(
    tell: Callable[[Path], None], description: str, default: Options | None = None
) -> Callable[[list[str]], None]:
    """The main function of an experiment that tells what its folder of runs holds."""

    def main(args: list[str]) -> None:
        options = parse(
            Options, default or Options(), prog="run.py", description=description, args=args
        )
        with user_errors():
            tell(options.folder)

    return main


def train(folder: Path, name: str, *options: str, config: Path = CONFIG) -> Path:
    """The folder of a finished run of this name; it is trained, or resumed, if there is none.

    ValueError if the folder holds another run of that name. SystemExit if the training ends early.
    """
    folder, options = folder.absolute(), ("--config", str(config), *options)
    run, words = folder / f"{name}-001", [sys.executable, "-m", "dsv3_jax.train"]
    if run.exists():
        _check_same(run, resolve(list(options))[0].run)
        words += ["--resume", str(run)]
    else:
        words += [*options, "--output.folder", str(folder), "--output.name", name]
    if not (run / "result.json").exists():
        print(f"== {name}", flush=True)
        ended = subprocess.run(words, cwd=HERE.parent, check=False)
        if ended.returncode:
            raise SystemExit(ended.returncode)
    return run


def _check_same(run: Path, wanted: RunConfig) -> None:
    found = load_json(run / "config.json")
    ids = {"bos_id": wanted.model.bos_id, "eos_id": wanted.model.eos_id}  # the tokenizer's
    found = replace(found, model=replace(found.model, **ids), output=wanted.output)
    if found != wanted:
        raise ValueError(f"{run} is a run of another configuration; allowed: another --folder")


def main_losses(run: Path) -> np.ndarray:
    """Of every step."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    entries = [entry for entry in map(json.loads, lines) if entry["kind"] == "train"]
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1)), run
    return np.array([entry["main_loss"] for entry in entries])


def smoothed(losses: np.ndarray) -> np.ndarray:
    """Running means that begin with the first loss."""
    means = [losses[0]]
    for loss in losses[1:]:
        means.append(FADING * means[-1] + (1 - FADING) * loss)
    return np.array(means)


def relative_error(run: Path, baseline: Path) -> np.ndarray:
    """Of the smoothed loss, step by step."""
    reference = smoothed(main_losses(baseline))
    return (smoothed(main_losses(run)) - reference) / reference
