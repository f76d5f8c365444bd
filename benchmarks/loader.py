"""How many tokens a second the loader gives, beside what the tiny training consumes.

    python benchmarks/loader.py [--seconds 5] [--readers 1]

Expected: at least ten times the training's rate in every line. Rows are those of the default run
(the standard library's source, 256 tokens). Besides them: the same documents read from ArrayRecord
shards, and a mixture of both with a tenth of the documents in fill-in-the-middle order.
"""

import itertools
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from dsv3_jax.cli import parse, run
from dsv3_jax.config import RunConfig
from dsv3_jax.config.presets import tiny_run

BATCH_ROWS = 8


@dataclass(frozen=True)
class Options:
    """What is compared with what."""

    seconds: float = 5.0
    """Time for the training and for each kind of rows"""
    readers: int = 1
    """Threads that read ahead"""


def main(args: list[str]) -> None:
    """Prints one line for each kind of rows."""
    options = parse(Options, Options(), prog="loader.py", description=__doc__, args=args)
    from rich.console import Console

    from dsv3_jax.data.corpus import build_corpus
    from dsv3_jax.pretokenize import write
    from dsv3_jax.train.machine import describe

    print(describe())
    print(f"{'rows':<28}{'tokens/s':>12}{'of training':>14}")
    cfg = tiny_run()
    training = training_tokens_per_second(cfg, options.seconds)
    print(f"{'training itself':<28}{training:>12,.0f}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(Path(temporary, "tokens"))
        write(cfg.data, Path(folder), cfg.model.vocab_size, Console(quiet=True))
        on_disk = replace(cfg.data, source=folder)
        mixed = replace(cfg.data, source=(folder, "stdlib"), weights=(0.7, 0.3), fim_rate=0.1)
        kinds = {"memory": cfg.data, "ArrayRecord": on_disk, "mixture, middle last": mixed}
        for name, data in kinds.items():
            corpus = build_corpus(data, cfg.model.vocab_size, 0, lambda line: None)
            rate = tokens_per_second(corpus.train, options)
            print(f"{name:<28}{rate:>12,.0f}{rate / training:>13.0f}x", flush=True)


def training_tokens_per_second(cfg: RunConfig, seconds: float) -> float:
    """Of steps on one batch, after the first."""
    from contenders.dsv3_step import step_of

    step = step_of(cfg)
    step()
    steps, begun = 0, time.perf_counter()
    while time.perf_counter() < begun + seconds:
        step()
        steps += 1
    return steps * cfg.train.rows * cfg.data.length / (time.perf_counter() - begun)


def tokens_per_second(rows, options: Options) -> float:
    """Of batches as the training takes them, after the first."""
    from dsv3_jax.data.loader import load

    batches = load(rows, 0, itertools.repeat(BATCH_ROWS), options.readers)
    next(batches)
    start, tokens = time.perf_counter(), 0
    while time.perf_counter() < start + options.seconds:
        tokens += next(batches).tokens_BT.size
    batches.close()
    return tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    run(main)
