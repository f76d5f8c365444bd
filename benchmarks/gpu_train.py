"""This project's train step on one GPU: BF16 and FP8, tokens/s, MFU, memory, compilation.

    python benchmarks/gpu_train.py [--recipes bf16 fp8] [--steps 8] [--rows 4] [--json FILE]

`--rows 8` took 52 GiB in FP8 and 61 in BF16; `--kernels-told 30` adds where the time goes, kernel
by kernel, and with XLA_FLAGS=--xla_gpu_enable_command_buffer= also of what in the code. Figures in
README.md are with XLA_FLAGS=--xla_gpu_enable_triton_gemm=false, since trying Triton for each of
some hundred shapes takes long.

A model of V3's shape that fills one 80 GB device: MLA with heads of 192 and 128, a dense layer,
MoE layers of which a token uses 8 experts and a shared one, MTP; rows of 4096 random tokens, new
ones at every step. The step is the one that training compiles: gradients summed over
micro-batches, clipping, AdamW with BF16 moments on float32 masters, the state donated. Each recipe
has a process of its own, so that peaks of memory are its own; XLA's flags are those of training.
JAX, flax, optax and numpy are all it needs.

MFU is over the BF16 peak of an H100 or H200, dense, for every recipe; FLOPs are those of
`dsv3_jax.plan.cost`, with the causal half of the scores and with the whole square.

Expected: a line for each recipe, and their ratio; a few minutes on a GPU, most of it compilation.
Without a GPU it says so in one line and ends; `--preset small` takes a minute or two on a CPU, its
figures mean nothing there.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package may not be installed

from contenders import command_line

from dsv3_jax.cli import fail, run
from dsv3_jax.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    QuantConfig,
    RunConfig,
    TrainConfig,
)
from dsv3_jax.config.quant import WITH_KERNELS
from dsv3_jax.parallel import gpu_flags

if TYPE_CHECKING:
    from dsv3_jax.data.loader import Batch
    from dsv3_jax.train.step import Coefficients

RECIPES = ("bf16", "fp8", "fp8_pow2", "fp8_per_tensor", "fp8_square_gradients")
MEMORY_SHARE = "0.94"  # of the device's, for JAX; its own default is 0.75
GIB = 2**30


def full() -> ModelConfig:
    """2.4 B parameters: 12 bytes of each for master, moments and gradient, and 4 more for the
    sums over micro-batches. So many MoE layers are scanned: one is compiled.
    """
    return ModelConfig(
        vocab_size=32768,
        d_model=2048,
        num_layers=10,
        num_dense_layers=1,
        num_heads=16,
        dense_hidden=8192,
        expert_hidden=1024,
        num_experts=32,
        num_groups=4,
        num_kept_groups=2,
    )


def small() -> ModelConfig:
    """Every kind of part, for CPUs."""
    return replace(
        full(),
        vocab_size=512,
        d_model=128,
        num_layers=1,  # dense; MTP's has experts
        num_heads=2,
        q_latent=64,
        kv_latent=64,
        dense_hidden=256,
        expert_hidden=128,
        num_experts=16,
        experts_per_token=4,
    )


PRESETS: Mapping[str, tuple[Callable[[], ModelConfig], int]] = {
    "full": (full, 4096),
    "small": (small, 128),
}
"""Model and tokens of a row."""


def parsed(args: Sequence[str]) -> argparse.Namespace:
    """Exits 0 after --help, 2 after a mistake."""
    parser = command_line.parser("gpu_train.py", __doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="full", help="model and length of rows")
    add(
        "--recipes",
        nargs="+",
        choices=RECIPES,
        default=["bf16", "fp8"],
        help="precisions of the linears, each by itself",
    )
    add("--steps", type=int, default=8, help="measured steps")
    add("--warm-up", type=int, default=2, help="steps before them, after compilation")
    add("--rows", type=int, default=4, help="rows of a step")
    add(
        "--microbatches",
        type=int,
        help="parts a step's rows are computed in; default: 1 where kernels for Hopper GPUs "
        "multiply experts (bf16, fp8, fp8_pow2), else one for each row, since a weight is gathered "
        "for every block of rows",
    )
    add("--remat", choices=("none", "report", "full"), default="report", help="recomputation")
    add(
        "--kernels",
        choices=("auto", "on", "off"),
        default="auto",
        help="as --quant.kernels, of FP8",
    )
    add("--experts", type=int, help="in place of the preset's")
    add("--layers", type=int, help="in place of the preset's; more than 9 are scanned")
    add("--kernels-told", type=int, default=0, help="so many of the longest, of one more step")
    add("--json", type=command_line.new_file, help="file that keeps the figures")
    options = command_line.parsed(parser, args)
    for name in ("steps", "warm_up", "rows"):
        if getattr(options, name) < 1:
            fail(f"--{name.replace('_', '-')} is {getattr(options, name)}; allowed: at least 1")
    return options


def config(options: argparse.Namespace, recipe: str, missing: str | None = None) -> RunConfig:
    """Of one recipe's run, on a machine where kernels are missing something. ValueError for sizes
    that cannot be.
    """
    preset, length = PRESETS[options.preset]
    changes = {"num_experts": options.experts, "num_layers": options.layers}
    given = {name: value for name, value in changes.items() if value is not None}
    model = replace(preset(), **given)
    kernels = options.kernels if recipe in WITH_KERNELS else "auto"
    gathers = missing or kernels == "off" or recipe not in (*WITH_KERNELS, "bf16")
    return RunConfig(
        model=model,
        data=DataConfig(length=length),
        train=TrainConfig(
            rows=options.rows,
            microbatches=options.microbatches or (options.rows if gathers else 1),
            dtype="bfloat16",
            remat=options.remat,
        ),
        optimizer=OptimizerConfig(),
        quant=QuantConfig(recipe, kernels),
    )


def main(args: Sequence[str]) -> None:
    """Prints a line for each recipe."""
    options = parsed(args)
    try:
        for recipe in options.recipes:
            config(options, recipe)
    except ValueError as error:
        fail(str(error))
    failed = False
    if len(options.recipes) == 1:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_SHARE)
        gpu_flags.apply(os.environ)
        results = measured_alone(options)
    else:
        results, failed = in_processes(args, options.recipes)
        tell_ratio(results)
    if options.json and results:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if failed:
        raise SystemExit(1)


def measured_alone(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Figures of the one recipe; none where the preset cannot run, which it says. SystemExit 2 for
    kernels that are on and cannot run.
    """
    import jax

    from dsv3_jax.quant.kernels.choice import lacking
    from dsv3_jax.quant.recipes import recipe_of

    if options.preset != "small" and jax.default_backend() != "gpu":
        print("skipped: JAX finds no GPU (nor does its CPU version); --preset small runs anywhere")
        return []
    missing = lacking()
    cfg = config(options, options.recipes[0], missing)
    try:
        recipe_of(cfg.quant)
    except ValueError as error:
        fail(str(error))
    if missing:
        print(f"no kernels of this project's: FP8 is emulated, since {missing}", flush=True)
    return [measured(cfg, options)]


def in_processes(args: Sequence[str], recipes: Sequence[str]) -> tuple[list[dict[str, Any]], bool]:
    """The same command for one recipe after the other, and their figures: none of a recipe that
    failed, which it has said, and none at all where there is no GPU. And whether any failed.
    """
    results, failed = [], False
    with tempfile.TemporaryDirectory() as folder:
        for recipe in recipes:
            kept = Path(folder) / f"{recipe}.json"
            own = [*args, "--recipes", recipe, "--json", str(kept)]
            sys.stdout.flush()
            ended = subprocess.run([sys.executable, __file__, *own], check=False)
            if ended.returncode == 2:  # a mistake, which is every recipe's
                raise SystemExit(2)
            if kept.exists():
                results += json.loads(kept.read_text())
            elif ended.returncode == 0:
                return results, False
            failed |= ended.returncode != 0
    return results, failed


def tell_ratio(results: Sequence[Mapping[str, Any]]) -> None:
    """Each recipe's speed over that of BF16."""
    base = next((found for found in results if found["recipe"] == "bf16"), None)
    for found in results:
        if base and found is not base:
            ratio = found["tokens_per_second"] / base["tokens_per_second"]
            means = "" if "gpu" in found["machine"] else ", which means nothing on a CPU"
            print(f"{found['recipe']} / bf16: {ratio:.3f} times the tokens/s{means}")


def measured(cfg: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one recipe, as printed and kept. SystemExit if an update cannot be made."""
    import jax

    from dsv3_jax.train.machine import describe, device_peak_memory
    from dsv3_jax.train.step import abstract_state, init_state, make_step

    flags = os.environ.get("XLA_FLAGS", "")
    print(f"{describe()}; {sizes_of(cfg)}; XLA_FLAGS {flags!r}; tracing and compiling", flush=True)
    begun = time.perf_counter()
    graphdef, shapes = abstract_state(cfg)
    lowered = make_step(graphdef, cfg).lower(shapes, *abstract_arguments(cfg))
    lowering = time.perf_counter() - begun
    step = lowered.compile()
    compiling = time.perf_counter() - begun - lowering
    state = jax.block_until_ready(init_state(cfg))
    seconds, losses = [], []
    for number in range(options.warm_up + options.steps):
        batch, coefficients = arguments(cfg, number)
        jax.block_until_ready(batch)
        begun = time.perf_counter()
        state, metrics = step(state, batch, coefficients)
        metrics = jax.device_get(metrics)
        seconds.append(time.perf_counter() - begun)
        if not metrics.applied:
            raise SystemExit(f"{cfg.quant.recipe}: no update, the loss is {metrics.loss}")
        losses.append(float(metrics.parts.main))
    found = figures(cfg, seconds[options.warm_up :]) | {
        "lowering_seconds": lowering,
        "compile_seconds": compiling,
        "peak_bytes": device_peak_memory(),
        "planned_bytes": planned_bytes(step),
        "losses": losses,
        "machine": describe(),
    }
    print(line_of(found), flush=True)
    if options.kernels_told:
        from contenders.kernel_times import traced

        times = traced(lambda: step(state, batch, coefficients), step.as_text())
        print("\n".join(times.lines(options.kernels_told)))
        found["kernels"] = [kernel._asdict() for kernel in times.kernels]
    return found


def sizes_of(cfg: RunConfig) -> str:
    count = cfg.model.param_count()
    return (
        f"{(count.main + count.mtp) / 1e6:,.1f} M parameters ({count.activated / 1e6:,.1f} M "
        f"activated, without MTP), {cfg.train.rows} rows of {cfg.data.length} in "
        f"{cfg.train.microbatches} micro-batches, remat {cfg.train.remat}"
    )


def abstract_arguments(cfg: RunConfig) -> "tuple[Batch, Coefficients]":
    """Shapes of what a step takes beside its state."""
    import jax
    import jax.numpy as jnp

    from dsv3_jax.data.loader import Batch
    from dsv3_jax.train.step import Coefficients

    array = jax.ShapeDtypeStruct((cfg.train.rows, cfg.data.length), jnp.int32)
    return Batch(array, array), Coefficients(*[jax.ShapeDtypeStruct((), jnp.float32)] * 4)


def arguments(cfg: RunConfig, number: int) -> "tuple[Batch, Coefficients]":
    """Random tokens of a step, and what its schedules would say early in a run."""
    import jax.numpy as jnp
    import numpy as np

    from dsv3_jax.data.loader import Batch
    from dsv3_jax.train.step import Coefficients

    size = cfg.train.rows, cfg.data.length + 1
    row = np.random.default_rng(number).integers(0, cfg.model.vocab_size, size, np.int32)
    batch = Batch(jnp.asarray(row[:, :-1]), jnp.asarray(row[:, 1:]))
    return batch, Coefficients(*(jnp.float32(x) for x in (1e-4, 1e-3, 0.3, jnp.inf)))


def figures(cfg: RunConfig, seconds: Sequence[float]) -> dict[str, Any]:
    """What follows from the times of a recipe's steps."""
    from dsv3_jax.plan.cost import train_flops_per_token
    from dsv3_jax.plan.hardware import H100

    tokens, step = cfg.train.rows * cfg.data.length, statistics.median(seconds)
    flops = {
        name: train_flops_per_token(cfg.model, cfg.data.length, causal=causal)
        for name, causal in (("causal", True), ("square", False))
    }
    return {
        "recipe": cfg.quant.recipe,
        "seconds": list(seconds),
        "step_seconds": step,
        "tokens": tokens,
        "tokens_per_second": tokens / step,
        "flops_per_token": flops,
        "mfu": {name: each * tokens / step / H100.bf16.value for name, each in flops.items()},
    }


def planned_bytes(step: Any) -> dict[str, int] | None:
    """What the compiler says that the step takes: its arguments, which are donated, and its own."""
    analysis = step.memory_analysis()
    if analysis is None:
        return None
    return {
        "arguments": analysis.argument_size_in_bytes,
        "temporary": analysis.temp_size_in_bytes,
    }


def line_of(found: Mapping[str, Any]) -> str:
    """A recipe's figures as they are read."""
    peak = found["peak_bytes"]
    planned = found["planned_bytes"] or {}
    return (
        f"{found['recipe']}: {found['tokens_per_second']:,.0f} tokens/s, "
        f"{found['step_seconds'] * 1e3:,.1f} ms a step "
        f"({min(found['seconds']) * 1e3:,.1f} to {max(found['seconds']) * 1e3:,.1f}); "
        f"{found['flops_per_token']['causal'] / 1e9:,.3f} GFLOPs a token causal, "
        f"{found['flops_per_token']['square'] / 1e9:,.3f} square; "
        f"MFU {found['mfu']['causal']:.2%} causal, {found['mfu']['square']:.2%} square; "
        f"peak {f'{peak / GIB:.1f} GiB' if peak else 'unknown'}, planned "
        f"{' + '.join(f'{size / GIB:.1f} GiB {name}' for name, size in planned.items())}; "
        f"traced in {found['lowering_seconds']:.1f} s, compiled in {found['compile_seconds']:.1f} s"
        f"; main loss {found['losses'][0]:.3f} to {found['losses'][-1]:.3f}"
    )


if __name__ == "__main__":
    run(main)
