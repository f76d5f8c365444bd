"""Seconds from the command `python -m dsv3_jax.train` to the end of its first step.

    python benchmarks/startup.py [--rounds 3] [--config FILE]

The default run: imports, corpus, compilation and one step, up to the step's entry in the run's
metrics.jsonl. Each round has a compilation cache of its own and starts the command twice: cold,
with that cache empty, and warm, with what the cold one left there. The tokenizer and the tokens are
in the user's cache folder before the first round, as after any earlier run.

Expected on two cores (AVX2): 29 to 38 s cold and 9 to 11 s warm, where the aims are 30 and 10.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv3_jax.cli import fail, parse, run
from dsv3_jax.config.fields import check
from dsv3_jax.config.load import load_config
from dsv3_jax.config.presets import tiny_run

POLL = 0.01  # seconds between two looks at metrics.jsonl


@dataclass(frozen=True)
class Options:
    """What is started, and how often."""

    rounds: int = 3
    """Cold and warm starts, by turns"""
    config: Path | None = None
    """Another configuration than the default run's"""
    patience: float = 300.0
    """Seconds after which a start has failed"""

    def __post_init__(self) -> None:
        check("--rounds", self.rounds, self.rounds >= 1, "at least 1")


def main(args: Sequence[str]) -> None:
    """Prints one line for each start, and the medians."""
    options = parse(Options, Options(), prog="startup.py", description=__doc__, args=args)
    fill_data_cache(options)
    from dsv3_jax.train.machine import describe

    print(describe(), flush=True)
    seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    for i in range(options.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for kind, taken in seconds.items():
                taken.append(start(options, cache))
                print(f"round {i + 1}, {kind}: {taken[-1]:.1f} s", flush=True)
    for kind, taken in seconds.items():
        print(
            f"first step ends {statistics.median(taken):.1f} s after the command, {kind} "
            f"({min(taken):.1f} to {max(taken):.1f})"
        )


def fill_data_cache(options: Options) -> None:
    """Trains the tokenizer and tokenises, if no run has yet."""
    from dsv3_jax.data.corpus import build_corpus

    cfg = load_config(options.config) if options.config else tiny_run()
    build_corpus(cfg.data, cfg.model.vocab_size, cfg.train.seed, lambda line: None)


def start(options: Options, cache: str) -> float:
    """Seconds to the end of the first step; the run is ended there."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dsv3_jax.train", "--output.folder", folder]
        command += ["--train.steps", "2", "--output.log-every", "1"]
        command += ["--config", str(options.config)] if options.config else []
        log = Path(folder, "log")
        begun = time.perf_counter()
        with log.open("w") as said:
            process = subprocess.Popen(
                command,
                stdout=said,
                stderr=said,
                env={**os.environ, "JAX_COMPILATION_CACHE_DIR": cache},
            )
        try:
            while not first_step_ended(Path(folder)):
                if process.poll() is not None or time.perf_counter() > begun + options.patience:
                    fail(f"the command made no step; its last line: {last_line(log)}")
                time.sleep(POLL)
            return time.perf_counter() - begun
        finally:
            process.kill()
            process.wait()


def first_step_ended(folder: Path) -> bool:
    """Whether the one run in the folder has an entry of a train step."""
    for path in folder.glob("*/metrics.jsonl"):
        with contextlib.suppress(FileNotFoundError):
            return '"kind": "train"' in path.read_text(encoding="utf-8")
    return False


def last_line(log: Path) -> str:
    return (log.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1]


if __name__ == "__main__":
    run(main)
