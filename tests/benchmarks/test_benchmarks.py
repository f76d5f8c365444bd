"""What can be known of benchmarks without measuring: commands, arithmetic, talk with contenders."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax.config.presets import bench_cpu

ROOT = Path(__file__).parents[2]
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a script that lies in that folder."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def contender(name: str, group: str = "float32", tokens: int = 100, script: str = "", **fields):
    from contenders.side_by_side import Contender

    made = Contender(name, group, sys.executable, script, {}, tokens, **fields)
    made.facts = made.facts or {"versions": "1.0"}
    return made


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_says_its_command_and_what_to_expect(path: Path):
    said = ast.get_docstring(ast.parse(path.read_text()))
    assert f"    python benchmarks/{path.name}" in said
    assert "Expected" in said


def test_help_of_every_benchmark_starts_without_jax():
    code = """
import runpy, sys
for path in sys.argv[1:]:
    sys.path[0], sys.argv = path.rpartition("/")[0], [path, "--help"]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, path
loaded = {"jax", "torch", "matplotlib"} & set(sys.modules)
assert not loaded, loaded
"""
    command = [sys.executable, "-c", code, *map(str, BENCHMARKS)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("usage:") == len(BENCHMARKS)


def test_ratios_are_of_speeds_within_rounds_and_of_medians():
    from contenders.table import quartiles, ratio_of_medians, ratio_of_rounds, speeds

    ours = contender("ours", seconds=[1.0, 4.0, 2.0])
    theirs = contender("theirs", seconds=[2.0, 8.0, 8.0], tokens=50)
    assert speeds(ours) == [100, 25, 50]
    assert ratio_of_rounds(ours, theirs) == 4  # of 4, 4 and 8: of rounds, each with half the tokens
    assert ratio_of_medians(ours, theirs) == 8  # 50 tokens/s to 6.25
    assert quartiles([4, 1, 2, 3, 5]) == (2, 4)
    assert quartiles([7]) == (7, 7)


def test_what_only_qualified_has_no_ratio_of_rounds():
    from contenders.table import ratio_of_medians, ratio_of_rounds

    ours = contender("ours", seconds=[1.0, 1.0])
    slow = contender("slow", qualifying=[50.0, 30.0])
    assert ratio_of_rounds(ours, slow) is None
    assert ratio_of_medians(ours, slow) == pytest.approx(1 / (100 / 50 + 100 / 30) * 2 * 100)


def test_the_table_has_a_row_for_each_and_columns_that_line_up():
    from contenders.table import Peak, table

    ours = contender("ours", seconds=[0.5, 0.5, 0.5], peak_bytes=2_000_000)
    base = contender("torch sdpa", seconds=[1.0, 1.0, 1.0], qualifying=[1.0], is_baseline=True)
    other = contender("torch eager", qualifying=[2.0])
    slow = contender("slow", qualifying=[25.0], is_baseline=True)
    lines = table([ours, base, other, slow], ("torch", "slow"), Peak({"float32": 1000.0}, 2))
    head, rule, first, second, third, fourth, *notes = lines
    assert len({len(line) for line in (head, rule, first, second, third, fourth)}) == 1
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    ours_row = ["float32: ours", "1.0", "200", "200 to 200", "2"]
    assert cells == [*ours_row, "2.00", "2.00", "-", "50.00", "40.0%"]
    assert "torch sdpa (baseline) " in second
    assert "torch eager * " in third
    assert "* qualifying rounds only" in notes
    assert "slow takes 25 s a turn, more than 20 s" in notes[-1]


def test_a_kept_command_names_no_place_of_this_machine():
    from contenders.table import command

    given = ["/a/b/x.py", "--python", "/c/d/python", "--torch-python=/e/python", "--rows", "8"]
    shown = {"/c/d/python": "PYTHON", "/e/python": "PYTHON"}
    expected = "python benchmarks/x.py --python PYTHON --torch-python=PYTHON --rows 8"
    assert command(given, shown) == expected


def test_the_allocator_is_the_same_for_all(monkeypatch: pytest.MonkeyPatch):
    from contenders.side_by_side import SETTINGS, environment

    monkeypatch.setenv("MALLOC_ARENA_MAX", "7")
    assert SETTINGS.items() <= environment("tuned").items()
    assert not SETTINGS.keys() & environment("default").keys()


WORKER = """
import json, sys
sys.path.insert(0, {folder!r})
from answering import answer
print("a library says something")
print("noise " * 100_000, file=sys.stderr)
options = json.loads(sys.argv[1])
turns = 0
def work():
    global turns
    turns += 1
    if turns > options["last"]:
        sys.exit("worn out")
answer(work, warm_up=2, versions="worker", said=options["said"])
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory needs Linux")
def test_contenders_answer_take_turns_and_are_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    from contenders.side_by_side import contest

    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(folder=str(ROOT / "benchmarks" / "contenders")))

    def worker(name: str, last: int):
        made = contender(name, script=str(script))
        made.options = {"last": last, "said": name}
        return made

    ours, rival = worker("ours", 99), worker("rival", 99)
    tired, broken = worker("tired", 3), worker("broken", 1)
    ran = contest([ours], [[rival, broken], [tired]], qualify=2, rounds=3)
    assert ran == [ours, rival]
    assert (len(ours.seconds), len(ours.qualifying)) == (3, 0)
    assert (len(rival.seconds), len(rival.qualifying)) == (3, 2)
    assert rival.is_baseline
    assert not ours.is_baseline
    assert ours.facts["said"] == "ours"
    assert ours.facts["warm_up_seconds"] >= 0
    assert ours.peak_bytes > 1e6
    assert all(c.process is None for c in (ours, rival, tired, broken))
    said = capsys.readouterr().err
    assert "broken does not run: worn out" in said
    assert "tired does not run: worn out" in said


def test_the_fastest_goes_on_unless_it_is_too_slow():
    from contenders.side_by_side import _finalists

    quick, slow = (
        contender("quick", qualifying=[2.0, 3.0]),
        contender("slow", qualifying=[2.5, 9.0]),
    )
    assert _finalists([slow, quick]) == [quick]
    assert quick.is_baseline
    assert not slow.is_baseline
    hopeless = contender("hopeless", qualifying=[30.0, 40.0])
    assert _finalists([hopeless]) == []
    assert hopeless.is_baseline
    assert _finalists([]) == []


def test_figures_are_kept_as_measured(tmp_path: Path):
    from contenders.table import write_figures

    ours = contender("ours", seconds=[0.5, 1.0, 2.0])
    write_figures(tmp_path / "x.json", [ours], ["a line"], interpreters=[], machine="a machine")
    kept = json.loads((tmp_path / "x.json").read_text())
    assert kept["machine"] == "a machine"
    assert kept["printed"] == ["a line"]
    assert kept["contenders"][0]["seconds"] == [0.5, 1.0, 2.0]
    assert kept["contenders"][0]["tokens_per_second"] == 100


def test_rivals_are_all_variants_by_dtype():
    from train_cpu import Options, ours, rivals

    options = Options(torch_python="torch", maxtext_python="maxtext", python=("another",))
    float32, bfloat16, maxtext = rivals(options)
    assert [len(group) for group in (float32, bfloat16, maxtext)] == [5, 5, 1]
    assert {c.group for c in (*float32, *maxtext)} == {"float32"}
    assert len({c.name for c in float32}) == 5
    assert [(c.python, c.group) for c in ours(options)] == [
        (sys.executable, "float32"),
        (sys.executable, "bfloat16"),
        ("another", "float32"),
        ("another", "bfloat16"),
    ]
    (pure,) = rivals(Options(torch_python="torch", dtypes=("bfloat16",), pure_bfloat16=True))
    assert len({c.name for c in pure}) == 10


def test_weights_gathered_by_copy_are_left_out_where_they_are_gigabytes():
    from contenders.serving import gathered_bytes
    from decode_cpu import Options, transformers

    assert gathered_bytes(bench_cpu(), 1) == 4 * 3 * 256 * 128 * 4
    few, many = (transformers(Options(torch_python="torch"), rows) for rows in (8, 32))
    assert (len(few), len(many)) == (6, 4)
    assert not any("batched" in c.name for c in many)


def test_grouped_products_over_blocks_are_the_same_in_both_forms():
    """Forward, input and weight gradient, as the benchmark of their speed makes them."""
    import numpy as np
    from gemm import Options, block_forms

    blocks, scan = block_forms(Options(tokens=12, experts=4, blocks=(8,)))
    assert (blocks.name, scan.name) == ("blocks 8", "scan 8")
    for kind, product in blocks.products.items():
        made, expected = np.asarray(product()), np.asarray(scan.products[kind]())
        np.testing.assert_allclose(made, expected.reshape(made.shape), rtol=1e-5, atol=1e-4)


def test_a_straight_line_is_found_through_points_on_it():
    from scaling import straight_line

    intercept, slope = straight_line([1, 2, 4, 8], [3, 5, 9, 17])
    assert (intercept, slope) == (pytest.approx(1), pytest.approx(2))


def small_train(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> dict:
    """What the GPU's benchmark keeps of one recipe on this CPU, in the smallest way."""
    import gpu_train

    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.1")  # to be as it was afterwards
    kept = folder / "figures.json"
    sizes = "--preset small --rows 2 --microbatches 1 --remat none --steps 2 --warm-up 1"
    gpu_train.main([*sizes.split(), "--json", str(kept), *options])
    (found,) = json.loads(kept.read_text())
    return found


@pytest.mark.slow
def test_the_step_on_a_gpu_is_measured_on_a_cpu_in_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    found = small_train(monkeypatch, tmp_path, "--recipes", "bf16", "--kernels-told", "3")
    assert found["recipe"] == "bf16"
    assert (found["tokens"], len(found["seconds"]), len(found["losses"])) == (256, 2, 3)
    assert found["tokens_per_second"] == pytest.approx(256 / found["step_seconds"])
    causal, square = (found["mfu"][name] for name in ("causal", "square"))
    assert 0 < causal < square < 1
    peak = found["flops_per_token"]["causal"] * found["tokens_per_second"] / causal
    assert peak == pytest.approx(989.4e12)
    assert found["compile_seconds"] > 0
    said = capsys.readouterr().out.splitlines()
    assert said[-5].startswith("bf16: ")
    assert f"{found['tokens_per_second']:,.0f} tokens/s" in said[-5]
    seconds = [kernel["seconds"] for kernel in found["kernels"]]
    assert seconds == sorted(seconds, reverse=True)
    assert said[-4].startswith(f"{sum(seconds) * 1e3:,.1f} ms in {len(seconds):,} kinds")
    sources = {kernel["source"].split("/")[-1] for kernel in found["kernels"]}
    assert {"dot_general", "gather", "reduce_sum"} <= sources


def test_the_model_for_a_gpu_is_v3_in_shape_and_fits_one():
    from gpu_train import config, parsed

    from dsv3_jax.config import ModelConfig
    from dsv3_jax.train.memory import state_bytes

    cfg = config(parsed([]), "fp8")
    model, published = cfg.model, ModelConfig()
    for name in ("nope_dim", "rope_dim", "v_dim", "experts_per_token", "num_shared_experts"):
        assert getattr(model, name) == getattr(published, name)
    assert (model.mtp_depth, cfg.data.length, cfg.quant.recipe) == (1, 4096, "fp8")
    count = model.param_count()
    assert 2e9 < count.main + count.mtp < 4e9
    sums = (count.main + count.mtp) * 4 * (cfg.train.microbatches > 1)
    assert state_bytes(cfg) + sums < 0.7 * 80e9


def test_rows_are_computed_together_where_no_weight_is_gathered_for_each_block():
    from gpu_train import config, parsed

    counts = {
        (recipe, kernels): config(parsed(["--rows", "8", "--kernels", kernels]), recipe)
        for recipe, kernels in (
            ("bf16", "auto"),
            ("bf16", "off"),  # which is said of FP8
            ("fp8", "auto"),
            ("fp8", "off"),
            ("fp8_per_tensor", "auto"),
        )
    }
    assert [cfg.train.microbatches for cfg in counts.values()] == [1, 1, 1, 8, 8]
    missing = config(parsed(["--rows", "8"]), "bf16", "kernels need Hopper GPUs")
    assert missing.train.microbatches == 8


def test_a_benchmark_for_gpus_says_once_that_there_is_none():
    command = [sys.executable, "benchmarks/gpu_train.py", "--recipes", "bf16", "fp8"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout == (
        "skipped: JAX finds no GPU (nor does its CPU version); --preset small runs anywhere\n"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--preset huge", "--preset: invalid choice: 'huge'"),
        ("--steps 0", "--steps is 0; allowed: at least 1"),
        ("--rows 3 --microbatches 2", "train.microbatches is 2, which does not divide train.rows"),
        ("--experts 6", "model.num_groups is 4, which does not divide num_experts = 6"),
    ],
)
def test_a_mistake_in_the_gpus_options_is_one_line(
    options: str, said: str, capsys: pytest.CaptureFixture
):
    import gpu_train

    with pytest.raises(SystemExit) as ended:
        gpu_train.main(options.split())
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_kernels_that_cannot_run_are_one_line():
    command = [sys.executable, "benchmarks/gpu_train.py", "--preset", "small", "--recipes", "fp8"]
    ended = subprocess.run(
        [*command, "--kernels", "on"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert "quant.kernels is on; allowed here: auto, off" in line


def test_speeds_of_recipes_are_over_that_of_bf16(capsys: pytest.CaptureFixture):
    from gpu_train import tell_ratio

    speeds, machine = {"fp8": 300.0, "bf16": 200.0}, {"machine": "1 gpu device"}
    results = [{"recipe": x, "tokens_per_second": y} | machine for x, y in speeds.items()]
    tell_ratio(results)
    assert capsys.readouterr().out == "fp8 / bf16: 1.500 times the tokens/s\n"
    tell_ratio([each | {"machine": "1 cpu device"} for each in results])
    assert capsys.readouterr().out.endswith(" times the tokens/s, which means nothing on a CPU\n")
    tell_ratio(results[:1])
    assert capsys.readouterr().out == ""


def test_benchmarks_for_gpus_need_few_packages():
    """They go to machines that have no more than JAX, flax, optax, numpy and what these need."""
    code = """
import sys
for name in ("array_record", "grain", "matplotlib", "orbax", "safetensors", "tokenizers", "tyro"):
    sys.modules[name] = None  # to import it is an error
sys.path.insert(0, "benchmarks")
import gpu_gemm, gpu_train
import contenders.gpu_cases, dsv3_jax.quant.kernels.choice
import dsv3_jax.plan.cost, dsv3_jax.plan.hardware, dsv3_jax.train.machine, dsv3_jax.train.step
"""
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
