"""Loss curves of runs that share a seed, data and steps: made, read, compared."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
FADING = 0.9  # of the running mean (report, appendix B.1)


def train(folder: Path, name: str, *options: str) -> Path:
    """The folder of a finished run of this name; it is trained, or resumed, if there is none."""
    run = folder / f"{name}-001"
    command = [sys.executable, "-m", "dsv3_jax.train"]
    if (run / "config.json").exists():
        command += ["--resume", str(run)]
    else:
        command += [*options, "--output.folder", str(folder), "--output.name", name]
    if not (run / "result.json").exists():
        print(f"== {name}", flush=True)
        subprocess.run(command, cwd=ROOT, check=True)
    return run


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
