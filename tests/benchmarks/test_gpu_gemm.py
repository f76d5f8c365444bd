"""The benchmark of kernels on a GPU: what it says, keeps and leaves out."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from tests.quant.kernels.interpret import needs_interpreter

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a script that lies in that folder."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def variant(name: str, **fields):
    """That adds one to each of two arrays."""
    import jax.numpy as jnp
    from contenders.gpu_cases import Variant

    return Variant(name, lambda x: x + 1, [(jnp.zeros(2),), (jnp.ones(2),)], 4e12, **fields)


def checked(wrong: bool):
    return lambda y: {"relative error": float(y[0]) / 1000, "wrong": wrong}


@needs_interpreter
def test_kernels_are_checked_on_a_cpu_in_small(tmp_path: Path, capsys: pytest.CaptureFixture):
    import gpu_gemm

    kept = tmp_path / "figures.json"
    parts = ["dense", "grouped", "wgrad"]
    gpu_gemm.main(["--preset", "small", "--parts", *parts, "--json", str(kept)])
    said = capsys.readouterr().out.splitlines()
    figures = json.loads(kept.read_text())
    assert figures["command"].endswith("gpu_gemm.py --preset small --parts dense grouped wgrad")
    assert figures["printed"] == said
    assert said[1].startswith("dense 128 rows, 100 x 256 (N as 128): relative error ")
    assert [len(case["variants"]) for case in figures["cases"]] == [1, 2, 2]  # with BF16 by kernel
    assert not any(case["wrong"] for case in figures["cases"])
    made = [variant for case in figures["cases"] for variant in case["variants"]]
    assert all(0 < each["errors"]["relative error"] < 2e-3 for each in made)
    assert not any(each["seconds"] for each in made)


def test_variants_take_turns_and_the_first_sets_output_is_checked():
    from gpu_gemm import ROUNDS, contest

    ours, theirs = contest([variant("fp8", check=checked(False)), variant("bf16")], timed=True)
    assert (ours["errors"]["relative error"], theirs["errors"]) == (0.001, {})
    assert len(ours["seconds"]) == len(theirs["seconds"]) == ROUNDS
    (alone,) = contest([variant("fp8", check=checked(True)), variant("bf16")], timed=False)
    assert (alone["errors"]["wrong"], alone["seconds"]) == (True, [])


def figures_of(name: str, work: float, seconds: list[float], errors: dict | None = None) -> dict:
    return {"name": name, "work": work, "seconds": seconds, "errors": errors or {}}


def test_rates_are_of_medians_and_ratios_of_rounds():
    from gpu_gemm import lines_of

    errors = {"relative error": 0.00123, "diff": 0.0, "wrong": False}
    ours = figures_of("fp8", 1e12, [1e-3, 1e-3, 4e-3], errors)
    theirs = figures_of("bf16", 1e12, [2e-3, 4e-3, 4e-3])
    assert lines_of("dense", [ours, theirs]) == (
        "dense: relative error 1.2e-03, diff 0.0e+00; 1,000 us, 1,000 TFLOP/s; 51% of the FP8 "
        "peak, 101% of BF16's; BF16 through XLA 250, 25% of its peak; 2.00 times"
    )
    own = figures_of("bf16 by kernel", 1e12, [2e-3, 3e-3, 4e-3], errors)
    assert lines_of("grouped", [ours, theirs, own]).endswith(
        "; BF16 by kernel: relative error 1.2e-03, diff 0.0e+00; 333, 1.00 times XLA's"
    )
    rows = figures_of("rows", 3e9, [2e-3] * 3, {"differing bytes": 0.5, "wrong": True})
    copy = figures_of("copy", 4e9, [2e-3] * 3)
    assert lines_of("passes", [copy, rows]).splitlines() == [
        "passes:",
        "  copy: 2,000 us, 2,000 GB/s; 1.00 of the copy",
        "  rows: WRONG: differing bytes 5.0e-01; 2,000 us, 1,500 GB/s; 0.75 of the copy",
    ]


def test_what_fails_is_told_and_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch):
    import gpu_gemm

    def broken():
        raise ValueError("no such layout")

    def planted(*_):
        yield "broken", broken
        yield "wrong", lambda: time.sleep(0.1) or [variant("fp8", check=checked(True))]
        yield "late", broken

    monkeypatch.setattr(gpu_gemm, "cases", planted)
    options = gpu_gemm.parsed("--preset small --seconds 60".split())
    told = list(gpu_gemm.measured(options, time.monotonic() - 59.95))
    assert [text for text, _ in told] == [
        "broken: failed, ValueError: no such layout",
        "wrong: WRONG: relative error 1.0e-03",
        "left out, since 60 seconds are over: late",
    ]
    assert [bool(figures.get("wrong")) for _, figures in told] == [True, True, False]


def test_a_wrong_kernel_ends_the_command_with_1(monkeypatch: pytest.MonkeyPatch):
    import gpu_gemm

    wrong = variant("fp8", check=checked(True))
    monkeypatch.setattr(gpu_gemm, "lacking", lambda _: None)
    monkeypatch.setattr(gpu_gemm, "interpreting", gpu_gemm.contextlib.nullcontext)
    monkeypatch.setattr(gpu_gemm, "cases", lambda *_: [("planted", lambda: [wrong])])
    with pytest.raises(SystemExit) as ended:
        gpu_gemm.main(["--preset", "small"])
    assert ended.value.code == 1


def test_products_are_those_of_v3_and_of_its_weights_gradients():
    from gpu_gemm import PARTS, PRESETS, cases

    names = [name for name, _ in cases(PRESETS["full"], PARTS)]
    assert len(names) == len(set(names)) == 12 + 4 + 4 + 1
    assert names[0] == "dense 4096 rows, 2112 x 7168 (N as 2176)"
    assert "grouped 8 x 4096 rows, 7168 x 2048" in names
    assert "Wgrad 7168 x 4096, 3968 + 4224 + 0 + 3712 + 4480 tokens" in names
    assert [name.split()[0] for name, _ in cases(PRESETS["full"], ["wgrad"])] == ["Wgrad"] * 4


def test_without_a_hopper_gpu_it_says_so_in_one_line():
    command, env = (
        [sys.executable, "benchmarks/gpu_gemm.py"],
        {**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    (line,) = ended.stdout.splitlines()
    assert line.startswith("skipped: kernels need ")
    interpreted = jax.__version_info__ >= (0, 11, 2)
    assert line.endswith("; --preset small runs on a CPU") == interpreted


@pytest.mark.parametrize("name", ["gpu_gemm", "gpu_train"])
def test_benchmarks_for_gpus_start_where_nothing_is_installed(name: str, tmp_path: Path):
    """-S: not even packages that are; from another folder, with this one's package."""
    command = [sys.executable, "-S", str(ROOT / "benchmarks" / f"{name}.py"), "--help"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--parts densely", "--parts: invalid choice: 'densely'"),
        ("--seconds 0", "--seconds is 0; allowed: above 0"),
    ],
)
def test_a_mistake_in_its_options_is_one_line(
    options: str, said: str, capsys: pytest.CaptureFixture
):
    from gpu_gemm import main

    with pytest.raises(SystemExit) as ended:
        main(options.split())
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
