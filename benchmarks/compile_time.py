"""Seconds to trace, lower and compile our programs, without and with a compilation cache.

    python benchmarks/compile_time.py [--rounds 3]

Train steps of `tiny` (as the default run has it) and of `bench_cpu` (8 x 512, float32), and
greedy generation of `bench_cpu` (a prompt of 128 tokens, one row). Every figure is of a fresh
process; in a round, each runs twice on a persistent cache of its own: cold, with that empty, and
warm, with what the cold one left there. JAX keeps there what took a second or more to compile.
`trace` is what is neither lowering nor compilation; a cache saves nothing but the latter.

Expected: compilation is most of it when cold, a fraction of a second when warm. Five minutes on two
cores.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from contenders.side_by_side import ROOT, tell

from dsv3_jax.cli import fail, parse, run
from dsv3_jax.config.fields import check

SCRIPT = Path(__file__).parent / "contenders" / "compile_dsv3.py"
PROGRAMS = {
    "train step, tiny": {"program": "train", "preset": "tiny"},
    "train step, bench_cpu": {"program": "train", "preset": "bench_cpu"},
    "generation, bench_cpu": {"program": "decode", "preset": "bench_cpu"},
}
PARTS = ("trace", "lower", "compile", "total")


@dataclass(frozen=True)
class Options:
    """How often."""

    rounds: int = 3
    """Cold and warm compilations, by turns"""
    programs: tuple[str, ...] = tuple(PROGRAMS)
    """Of those named in the table"""

    def __post_init__(self) -> None:
        check("--rounds", self.rounds, self.rounds >= 1, "at least 1")
        for name in self.programs:
            check("--programs", name, name in PROGRAMS, "; ".join(PROGRAMS))


def main(args: Sequence[str]) -> None:
    """Prints one table of medians."""
    options = parse(Options, Options(), prog="compile_time.py", description=__doc__, args=args)
    from dsv3_jax.train.machine import describe

    measured: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for i in range(options.rounds):
        for name in options.programs:
            tell(f"round {i + 1} of {options.rounds}: {name}")
            with tempfile.TemporaryDirectory() as cache:
                for kind in ("cold", "warm"):
                    for part, seconds in compiled(name, cache).items():
                        measured.setdefault((name, part, kind), []).append(seconds)
    print(f"{describe()}; medians of {options.rounds} rounds, seconds\n")
    print(f"| {'program':<34} | cache | {' | '.join(f'{part:>7}' for part in PARTS)} |")
    print(f"| {'-' * 34} | ----- | {' | '.join('------:' for _ in PARTS)} |")
    for (name, part, kind), taken in measured.items():
        cells = [f"{statistics.median(t[p] for t in taken):>7.2f}" for p in PARTS]
        print(f"| {f'{name}: {part}':<34} | {kind:<5} | {' | '.join(cells)} |")


def compiled(name: str, cache: str) -> dict[str, dict[str, float]]:
    """Seconds of each part, by program, in a fresh process."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(PROGRAMS[name])],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        fail(f"{name}: {(done.stderr.strip().splitlines() or ['nothing said'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    run(main)
