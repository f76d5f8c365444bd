"""This project's FP8 kernels on one Hopper GPU: products and quantisation, beside XLA.

    python benchmarks/gpu_gemm.py [--parts dense grouped wgrad quantize] [--json FILE]

Products of V3's shapes (report 3.3.2), weights N x K: dense, for 4096 rows and for 128; grouped,
of several experts with M rows each; Wgrad, of one expert and of four uneven ones and an empty one.
Beside each stands BF16 through XLA, beside several experts' also BF16 by this project's own kernel.
N that is no multiple of 128 is multiplied filled up, as linears do, and cut again; FLOPs are those
of N. Then the passes that quantise, beside a copy. JAX, flax, optax and numpy are all it needs.

Each kernel is checked before it is timed, on random numbers: products against float32's of what
their operands stand for, by relative error and by 1 - 2 sum(x y) / sum(x^2 + y^2); quantisation
byte by byte against its definition under jit. The command ends with 1 if any fails or is wrong.

Times are medians over rounds in which the variants of a case take turns. A turn is a program that
goes over several sets of inputs, more than the L2 holds, with 24 launches or more, as often as
fills 20 ms, after once unmeasured; ratios are of rounds. What quantises, fills up or transposes
operands is not in a product's time. Peaks are an H100's or H200's, dense. What does not fit into
--seconds is left out, and said.

Expected: a line for each case, in some minutes. Without a Hopper GPU it says so in one line and
ends; `--preset small` interprets the kernels on a CPU (JAX 0.11.2 or later) at tiny sizes, in a
minute, and tells errors and no times.
"""

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package may not be installed

from contenders import command_line

from dsv3_jax.cli import fail, run
from dsv3_jax.plan.hardware import H100

if TYPE_CHECKING:
    from contenders.gpu_cases import Variant

PARTS = ("dense", "grouped", "wgrad", "quantize")
LAUNCHES = 24  # of a program, at least
TURN = 0.02  # seconds, at least: starting a program takes some 0.1 ms
ROUNDS = 6
V3 = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))

Figures = dict[str, Any]
Case = tuple[str, "Callable[[], list[Variant]]"]
"""Name, and what makes the inputs"""


@dataclass(frozen=True)
class Sizes:
    dense: Sequence[tuple[int, int, int]]
    """M, N, K"""
    grouped: Sequence[tuple[int, int, int, int]]
    """Experts, M of each, N, K"""
    wgrad: Sequence[tuple[int, int, tuple[int, ...]]]
    """D, F, blocks of 128 tokens of each expert"""
    matrix: tuple[int, int]
    """That is quantised"""
    swiglu: tuple[int, int]
    """Of SwiGLU's output"""
    multiprocessors: int | None = None


PRESETS: Mapping[str, Sizes] = {
    "full": Sizes(
        dense=[(m, n, k) for m in (4096, 128) for n, k in V3],
        grouped=[(e, m, n, k) for e, m in ((4, 8192), (8, 4096)) for n, k in V3[-2:]],
        wgrad=[
            (d, f, blocks)
            for blocks in ((32,), (31, 33, 0, 29, 35))
            for d, f in ((7168, 4096), (2048, 7168))
        ],
        matrix=(8192, 7168),
        swiglu=(16384, 2048),
    ),
    "small": Sizes(
        dense=[(128, 100, 256)],
        grouped=[(2, 128, 128, 128)],
        wgrad=[(128, 128, (1, 0, 1))],
        matrix=(128, 128),
        swiglu=(128, 128),
        multiprocessors=1,
    ),
}


def parsed(args: Sequence[str]) -> argparse.Namespace:
    """Exits 0 after --help, 2 after a mistake."""
    parser = command_line.parser("gpu_gemm.py", __doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="full", help="sizes; small: for CPUs, without times")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured")
    add("--seconds", type=float, default=400, help="no case is begun that may end later")
    add("--json", type=command_line.new_file, help="file that keeps the figures")
    options = command_line.parsed(parser, args)
    if not options.seconds > 0:
        fail(f"--seconds is {options.seconds:g}; allowed: above 0")
    return options


def main(args: Sequence[str]) -> None:
    """Prints each case's lines. SystemExit 1 if a kernel failed or is wrong."""
    begun, options = time.monotonic(), parsed(args)
    missing = lacking(options.preset)
    if missing:
        print(f"skipped: {missing}")
        return
    from dsv3_jax.train.machine import describe

    printed, found = [describe()], []
    print(printed[0], flush=True)
    asked = f"--preset {options.preset} --parts {' '.join(options.parts)}"
    kept = {"command": f"python benchmarks/gpu_gemm.py {asked}", "machine": printed[0]}
    with interpreting():
        for text, figures in measured(options, begun):
            print(text, flush=True)
            printed += text.splitlines()
            found.append(figures)
            if options.json:  # case by case: a machine may be taken away
                whole = json.dumps(kept | {"printed": printed, "cases": found}, indent=1)
                options.json.write_text(whole + "\n", encoding="utf-8")
    if any(figures.get("wrong") for figures in found):
        raise SystemExit(1)


def lacking(preset: str) -> str | None:
    """What this machine lacks, in words."""
    import jax
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from dsv3_jax.quant.kernels.choice import lacking as lacking_for_kernels

    if preset == "small" and jax.default_backend() == "cpu":
        if hasattr(plgpu, "InterpretGPUParams"):
            return None
        return f"JAX {jax.__version__} does not interpret kernels of Mosaic GPU; 0.11.2 does"
    missing = lacking_for_kernels()
    small = "; --preset small runs on a CPU" if hasattr(plgpu, "InterpretGPUParams") else ""
    return missing and f"{missing}{small}"


def interpreting() -> contextlib.AbstractContextManager:
    """On a CPU."""
    import jax
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if jax.default_backend() != "cpu":
        return contextlib.nullcontext()
    return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams())


def cases(sizes: Sizes, parts: Sequence[str]) -> Iterator[Case]:
    """Those of the parts, in their order."""
    from contenders import gpu_cases as make

    sms = sizes.multiprocessors
    for m, n, k in sizes.dense if "dense" in parts else ():
        filled = f" (N as {n + -n % make.BLOCK})" if n % make.BLOCK else ""
        name = f"dense {m} rows, {n} x {k}{filled}"
        yield name, lambda m=m, n=n, k=k: make.rows_case(sms, 1, m, n, k)
    for e, m, n, k in sizes.grouped if "grouped" in parts else ():
        name = f"grouped {e} x {m} rows, {n} x {k}"
        yield name, lambda e=e, m=m, n=n, k=k: make.rows_case(sms, e, m, n, k)
    for d, f, blocks in sizes.wgrad if "wgrad" in parts else ():
        tokens = " + ".join(str(each * make.BLOCK) for each in blocks)
        name = f"Wgrad {d} x {f}, {tokens} tokens"
        yield name, lambda d=d, f=f, blocks=blocks: make.wgrad_case(sms, d, f, blocks)
    if "quantize" in parts:
        (t, d), (u, f) = sizes.matrix, sizes.swiglu
        name = f"quantisation of {t} x {d}, SwiGLU of {u} x 2 x {f}"
        yield name, lambda: make.quantize_case(sizes.matrix, sizes.swiglu)


def measured(options: argparse.Namespace, begun: float) -> Iterator[tuple[str, Figures]]:
    """Lines and figures of each case, until the time is over."""
    longest, left_out = 0.0, []
    for name, make in cases(PRESETS[options.preset], options.parts):
        start = time.monotonic()
        if start - begun + longest > options.seconds:
            left_out.append(name)
            continue
        try:
            found = contest(make(), timed=options.preset != "small")
        except Exception as error:  # the other cases are still worth their time
            failed = f"{name}: failed, {type(error).__name__}: {str(error)[:300]}"
            yield failed, {"case": name, "wrong": failed}
        else:
            wrong = any(each["errors"].get("wrong") for each in found)
            yield lines_of(name, found), {"case": name, "wrong": wrong, "variants": found}
        longest = max(longest, time.monotonic() - start)
    if left_out:
        text = f"left out, since {options.seconds:g} seconds are over: {'; '.join(left_out)}"
        yield text, {"left_out": left_out}


def contest(variants: "Sequence[Variant]", timed: bool) -> list[Figures]:
    """Checks and, if wanted, times; variants without a check are there for their times alone."""
    import jax

    entered, found = [v for v in variants if timed or v.check], []
    programs = [jax.jit(in_order(each.run, LAUNCHES if timed else 1)) for each in entered]
    for each, program in zip(entered, programs, strict=True):
        first = program(each.sets)[0]
        errors = each.check(first) if each.check else {}
        found.append({"name": each.name, "work": each.work, "errors": errors, "seconds": []})
        del first
    for _ in range(ROUNDS if timed else 0):
        for each, program, figures in zip(entered, programs, found, strict=True):
            figures["seconds"].append(turn(program, each.sets))
    return found


def in_order(run: Callable[..., Any], launches: int) -> Callable[[Sequence[tuple]], list]:
    """One program that goes over all sets until it has launched so often, so that launching costs
    little; none is done beside another.
    """
    import jax

    def program(sets):
        done = []
        for args in [*sets] * math.ceil(launches / len(sets)):
            if done:
                done[-1], args = jax.lax.optimization_barrier((done[-1], args))
            done.append(run(*args))
        return done

    return program


def turn(program: Callable, sets: Sequence[tuple]) -> float:
    """Seconds of one product."""
    import jax

    begun = time.perf_counter()
    launches = len(jax.block_until_ready(program(sets)))
    times = math.ceil(TURN / (time.perf_counter() - begun))
    begun = time.perf_counter()
    for _ in range(times):
        made = program(sets)
    jax.block_until_ready(made)
    return (time.perf_counter() - begun) / (times * launches)


def lines_of(name: str, found: Sequence[Figures]) -> str:
    """A case's figures as they are read: a product's in one line, a pass's in one each."""
    by_name = {each["name"]: each for each in found}
    if "fp8" in by_name:
        return f"{name}: {product_line(*map(by_name.get, ('fp8', 'bf16', 'bf16 by kernel')))}"
    lines = [f"{each['name']}: {pass_line(each, by_name.get('copy'))}" for each in found]
    return "\n  ".join([f"{name}:", *lines])


def product_line(fp8: Figures, bf16: Figures | None, own: Figures | None) -> str:
    said = [errors_of(fp8)]
    if bf16:
        ours, other = rate(fp8), rate(bf16)
        said += [
            f"{statistics.median(fp8['seconds']) * 1e6:,.0f} us, {ours / 1e12:,.0f} TFLOP/s",
            f"{ours / H100.fp8.value:.0%} of the FP8 peak, {ours / H100.bf16.value:.0%} of BF16's",
            f"BF16 through XLA {other / 1e12:,.0f}, {other / H100.bf16.value:.0%} of its peak",
            f"{ratio_of_rounds(fp8, bf16):.2f} times",
        ]
    if own:
        said.append(f"BF16 by kernel: {errors_of(own)}")
        if bf16:
            said.append(f"{rate(own) / 1e12:,.0f}, {ratio_of_rounds(own, bf16):.2f} times XLA's")
    return "; ".join(said)


def pass_line(each: Figures, copy: Figures | None) -> str:
    said = [errors_of(each)] if each["errors"] else []
    if copy:
        seconds = statistics.median(each["seconds"])
        said.append(f"{seconds * 1e6:,.0f} us, {rate(each) / 1e9:,.0f} GB/s")
        said.append(f"{ratio_of_rounds(each, copy):.2f} of the copy")
    return "; ".join(said)


def errors_of(figures: Figures) -> str:
    errors = dict(figures["errors"])
    wrong = errors.pop("wrong")
    said = ", ".join(f"{name} {value:.1e}" for name, value in errors.items())
    return f"WRONG: {said}" if wrong else said


def rate(figures: Figures) -> float:
    """Work a second, by the median."""
    return figures["work"] / statistics.median(figures["seconds"])


def ratio_of_rounds(ours: Figures, other: Figures) -> float:
    """Median over rounds of our rate over the other's."""
    work = ours["work"] / other["work"]
    pairs = zip(ours["seconds"], other["seconds"], strict=True)
    return statistics.median(work * theirs / own for own, theirs in pairs)


if __name__ == "__main__":
    run(main)
