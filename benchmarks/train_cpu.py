"""Train steps on a CPU, side by side: ours, transformers on torch, MaxText.

    python benchmarks/train_cpu.py --torch-python PATH [--python PATH ...] [--maxtext-python PATH]

A step is the whole of it: loss, gradients, clipping, AdamW; of the shape `bench_cpu`, 8 rows of 512
random tokens, without MTP. Every contender is a process with its own interpreter and the same
allocator settings. transformers is the fastest of its variants in the qualifying rounds: attention
eager and sdpa, each with experts eager and grouped_mm, and one compiled. Its bfloat16 is autocast
over float32 masters, as ours is; --pure-bfloat16 adds variants that hold the weights in bfloat16.
MaxText is float32, dropless by ragged dot; what differs in its shape stands in
contenders/train_maxtext.py. Moments: ours bfloat16 as in the report, the others' as their weights.

Expected: a table with a row for each; ours ahead of transformers by 1.25 in float32 (jax 0.12) and
1.6 in bfloat16 at least, of MaxText by 8. 10 to 20 minutes on two cores with all of them.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro
from contenders.contest_options import ContestOptions, tell_figures
from contenders.side_by_side import Contender, check_interpreters, contest, environment
from contenders.table import Peak, table

from dsv3_jax.cli import parse, run, user_errors
from dsv3_jax.config.presets import bench_cpu
from dsv3_jax.plan.cost import train_flops_per_token

DType = Literal["float32", "bfloat16"]
# Of transformers: attention, experts, whether torch.compile goes over it.
VARIANTS = (
    ("eager", "eager", False),
    ("eager", "grouped_mm", False),
    ("sdpa", "eager", False),
    ("sdpa", "grouped_mm", False),
    ("sdpa", "grouped_mm", True),
)


@dataclass(frozen=True)
class Options(ContestOptions):
    """Who is compared, and how long."""

    maxtext_python: str | None = None
    """Interpreter with MaxText"""
    dtypes: tuple[DType, ...] = ("float32", "bfloat16")
    """Of activations and matrix products"""
    pure_bfloat16: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also transformers with weights and moments in bfloat16, among its bfloat16 variants"""
    remat: Literal["none", "report", "full"] = "none"
    """What ours recomputes in the backward pass"""
    rows: int = 8
    """Rows of a step"""
    length: int = 512
    """Tokens of a row"""
    warm_up: int = 3
    """Steps before the first round, compilation among them"""

    @property
    def interpreters(self) -> list[str]:
        """All that were named."""
        return [*super().interpreters, *([self.maxtext_python] if self.maxtext_python else [])]


def main(args: Sequence[str]) -> None:
    """Prints one table."""
    options = parse(Options, Options(), prog="train_cpu.py", description=__doc__, args=args)
    if not options.torch_python and not options.maxtext_python:
        print("skipped: no rival, give --torch-python or --maxtext-python")
        return
    with user_errors():
        check_interpreters(options.interpreters)
    ran = contest(ours(options), rivals(options), qualify=options.qualify, rounds=options.rounds)
    report(ran, options)


def ours(options: Options) -> list[Contender]:
    """This project under each interpreter, in each dtype."""
    return [
        _contender(
            options,
            name="dsv3_jax" if options.remat == "none" else f"dsv3_jax remat {options.remat}",
            group=dtype,
            python=python,
            script="train_dsv3.py",
            more={
                "model": dataclasses.asdict(bench_cpu()),
                "dtype": dtype,
                "remat": options.remat,
                "recipe": "dtype",
            },
        )
        for python in (sys.executable, *options.python)
        for dtype in options.dtypes
    ]


def rivals(options: Options) -> list[list[Contender]]:
    """transformers' variants for each dtype, and MaxText."""
    groups = []
    if options.torch_python:
        groups += [_transformers(options, dtype) for dtype in options.dtypes]
    if options.maxtext_python and "float32" in options.dtypes:
        maxtext = _contender(
            options,
            name="MaxText, dropless by ragged dot",
            group="float32",
            python=options.maxtext_python,
            script="train_maxtext.py",
            more={"model": dataclasses.asdict(bench_cpu()), "dtype": "float32"},
        )
        groups.append([maxtext])
    return groups


def _transformers(options: Options, dtype: DType) -> list[Contender]:
    """Its variants in one dtype."""
    precisions = [dtype]
    if dtype == "bfloat16" and options.pure_bfloat16:
        precisions.append("pure_bfloat16")
    config = bench_cpu().to_hf() | {"torch_dtype": "float32"}
    return [
        _contender(
            options,
            name=f"transformers {attention}, experts {experts}"
            + ", compiled" * compiled
            + ", weights in bfloat16" * (precision == "pure_bfloat16"),
            group=dtype,
            python=options.torch_python,
            script="train_transformers.py",
            more={
                "config": config,
                "attention": attention,
                "experts": experts,
                "compile": compiled,
                "dtype": precision,
            },
        )
        for precision in precisions
        for attention, experts, compiled in VARIANTS
    ]


def _contender(options: Options, *, more: dict[str, Any], **fields: Any) -> Contender:
    sizes = {"rows": options.rows, "length": options.length, "warm_up": options.warm_up}
    return Contender(
        **fields,
        options={**sizes, **more},
        tokens=options.rows * options.length,
        environment=environment(options.allocator),
    )


def report(ran: Sequence[Contender], options: Options) -> None:
    """Prints the table, and keeps the figures if asked to."""
    peaks: dict[str, float] = {}
    for c in ran:
        if "matmul_peak" in c.facts:
            peaks[c.group] = max(c.facts["matmul_peak"], peaks.get(c.group, 0))
    peak = Peak(peaks, train_flops_per_token(bench_cpu(), options.length))
    sizes = f"{options.rows} rows of {options.length} tokens"
    shown = ", ".join(f"{v / 1e9:,.0f} GFLOP/s in {k}" for k, v in peaks.items())
    lines = [*table(ran, ("transformers", "MaxText"), peak), "", f"matmul peak: {shown}"]
    tell_figures(options, ran, sizes, lines)


if __name__ == "__main__":
    run(main)
