"""What a train step costs: against its tokens, and against the number of experts.

    python benchmarks/scaling.py [--out scaling.png] [--dtype float32]

The shape is `bench_cpu` otherwise. Left: 2 to 32 rows of 512 tokens. Right: 8 to 128 experts of
which a token uses 4, in 4 groups of which it uses 2, at 8 rows. All steps are compiled first, in
this one process, and then run in alternating rounds; what counts are medians.

Expected: a straight line on the left, and nearly a flat one on the right: all experts are held and
updated, 16 times as many from one end to the other, but a token computes with 4. Some ten minutes
on two cores, about half of them compilation.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from contenders.table import quartiles

from dsv3_jax.cli import parse, run
from dsv3_jax.config.fields import check
from dsv3_jax.config.presets import bench_cpu, tiny_run


@dataclass(frozen=True)
class Options:
    """What is measured, and how often."""

    batches: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Rows of a step, left"""
    experts: tuple[int, ...] = (8, 16, 32, 64, 128)
    """Routed experts of a layer, right; multiples of 8"""
    rows: int = 8
    """Rows of a step, right"""
    length: int = 512
    """Tokens of a row"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and matrix products"""
    remat: Literal["none", "report", "full"] = "none"
    """What is recomputed in the backward pass"""
    rounds: int = 7
    """Alternating rounds, after one that compiles and one that warms up"""
    out: Path | None = None
    """Picture, .png, .svg or .pdf"""

    def __post_init__(self) -> None:
        check("--rounds", self.rounds, self.rounds >= 1, "at least 1")


@dataclass
class Point:
    """A step of one size, and the seconds it took."""

    tokens: int
    step: Callable[[], None] = field(repr=False)
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def main(args: Sequence[str]) -> None:
    """Prints two tables, and draws them."""
    options = parse(Options, Options(), prog="scaling.py", description=__doc__, args=args)
    from dsv3_jax.train.machine import describe

    by_tokens = [point(rows, bench_cpu().num_experts, options) for rows in options.batches]
    by_experts = [point(options.rows, experts, options) for experts in options.experts]
    take_turns([*by_tokens, *by_experts], options.rounds)

    machine = f"{describe()}; {options.dtype}, rows of {options.length} tokens"
    tokens = [p.tokens for p in by_tokens]
    intercept, slope = straight_line(tokens, [p.median for p in by_tokens])
    line = [intercept + slope * n for n in tokens]
    flat = [statistics.mean(p.median for p in by_experts)] * len(by_experts)
    print(machine)
    report("tokens", tokens, by_tokens, line)
    print(f"the line: {intercept * 1e3:.0f} ms and {slope * 1e6:.1f} us a token")
    report("experts", options.experts, by_experts, flat)
    if options.out:
        draw(options.out, machine, (tokens, by_tokens, line), (options.experts, by_experts, flat))


def report(what: str, xs: Sequence[int], points: Sequence[Point], line: Sequence[float]) -> None:
    """A table, and the largest deviation of a median from its line."""
    print(f"\n| {what:>7} | seconds | tokens/s | off the line |")
    print("| ------: | ------: | -------: | -----------: |")
    offs = [p.median / expected - 1 for p, expected in zip(points, line, strict=True)]
    for x, p, off in zip(xs, points, offs, strict=True):
        print(f"| {x:>7,} | {p.median:>7.3f} | {p.tokens / p.median:>8,.0f} | {off:>+12.1%} |")
    print(f"\nlargest deviation: {max(map(abs, offs)):.1%}")


def point(rows: int, experts: int, options: Options) -> Point:
    """A step on random tokens, compiled by its first run."""
    from contenders.dsv3_step import step_of

    tiny = tiny_run()
    cfg = replace(
        tiny,
        model=replace(bench_cpu(), num_experts=experts),
        train=replace(tiny.train, rows=rows, dtype=options.dtype, remat=options.remat),
        data=replace(tiny.data, length=options.length),
    )
    made = Point(rows * options.length, step_of(cfg))
    made.step()
    return made


def take_turns(points: Sequence[Point], rounds: int) -> None:
    """The first round warms up. Every round begins with another one."""
    for i in range(rounds + 1):
        for k in range(len(points)):
            p = points[(i + k) % len(points)]
            begun = time.perf_counter()
            p.step()
            if i:
                p.seconds.append(time.perf_counter() - begun)


def straight_line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope with the least squares of relative deviations."""
    import numpy as np

    y = np.asarray(ys)
    columns = np.stack([np.ones(len(y)), np.asarray(xs, float)], 1)
    intercept, slope = np.linalg.lstsq(columns / y[:, None], np.ones(len(y)), rcond=None)[0]
    return float(intercept), float(slope)


Panel = tuple[Sequence[int], Sequence[Point], Sequence[float]]


def draw(path: Path, machine: str, by_tokens: Panel, by_experts: Panel) -> None:
    """Measured points with their quartiles, and the lines that they should lie on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    _panel(left, by_tokens, "straight line")
    left.set(xlabel="tokens of a step", ylabel="seconds of a step", xlim=(0, None))
    _panel(right, by_experts, "flat line")
    right.set(xlabel="routed experts, of which a token uses 4")
    right.set_xscale("log", base=2)
    right.set_xticks(by_experts[0], [str(experts) for experts in by_experts[0]])
    figure.suptitle(machine, fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _panel(axes, panel: Panel, name: str) -> None:
    xs, points, line = panel
    medians = [p.median for p in points]
    spreads = [quartiles(p.seconds) for p in points]
    below = [m - low for m, (low, _) in zip(medians, spreads, strict=True)]
    above = [high - m for m, (_, high) in zip(medians, spreads, strict=True)]
    axes.plot(xs, line, color="tab:gray", label=name)
    axes.errorbar(xs, medians, (below, above), fmt="o", capsize=3, label="measured")
    axes.set_ylim(0, 1.15 * max([*medians, *line]))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


if __name__ == "__main__":
    run(main)
