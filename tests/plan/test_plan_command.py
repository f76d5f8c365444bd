"""`python -m dsv3_jax.plan --config`: tables, JSON, pictures; one line for every mistake."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax.plan.__main__ import main
from dsv3_jax.plan.cells import number
from dsv3_jax.plan.cpu_probe import measured_cpu
from dsv3_jax.plan.hardware import H800
from dsv3_jax.plan.layer_time import NOT_COUNTED
from tests.commands import help_of, mistake_of

CONFIGS = Path(__file__).parents[2] / "configs"
V3 = ["--config", str(CONFIGS / "dsv3_671b.py")]
DUAL = ["--config", str(CONFIGS / "tiny_dualpipe.py")]
TINY = ["--config", str(CONFIGS / "tiny.py")]


def out_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    main(args)
    out = capsys.readouterr()
    assert not out.err
    return out.out


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch):
    """Tables break no line."""
    monkeypatch.setenv("COLUMNS", "400")


def test_help_lists_both_kinds_of_plan_and_loads_no_jax():
    text, loaded = help_of("dsv3_jax.plan.__main__")
    assert {"jax", "matplotlib", "numpy"}.isdisjoint(loaded)
    for flag in ("--config", "--hardware", "--no-overlap", "--price", "--json", "--serve"):
        assert flag in text
    for flag in ("--what-if.comm-sms", "--what-if.ib", "--serving.batch", "--mesh.pipe", "--FB"):
        assert flag in text


@pytest.mark.parametrize(
    "args",
    [DUAL, [*V3, "--serve"], [*DUAL, "--what-if.accumulator-bits", "16"]],
    ids=["train", "serve", "promotion"],
)
def test_json_holds_what_the_tables_show(capsys, args):
    table = out_of(capsys, *args)
    told = json.loads(out_of(capsys, *args, "--json"))
    rows = [" ".join(row.split()) for row in table.splitlines()]
    for line in told["lines"]:
        cells = (
            line["label"],
            number(line["value"]),
            line["unit"],
            line["formula"],
            line["source"],
        )
        assert " ".join(" ".join(cells).split()) in rows
        assert line["section"] in rows
    for stage in told.get("stages", []):
        assert " ".join([str(stage["stage"]), stage["cut"], number(stage["F"])]) in "\n".join(rows)
    for step in told.get("steps", []):
        assert f"{step['rows']:,} {step['steps']:,} {step['schedule']}" in "\n".join(rows)
    assert told["assumed"] == list(H800.assumed)
    assert f"not counted: {NOT_COUNTED}" in rows
    assert all(f"assumed: {line}" in rows for line in told["assumed"])


def test_the_reports_run_is_planned_with_its_figures(capsys):
    told = json.loads(out_of(capsys, *V3, "--json"))
    lines = {line["label"]: line["value"] for line in told["lines"]}
    assert lines["the report's"] == 180e3
    assert round(lines["FLOPs, causal"], 3) == 250.456
    assert [step["schedule"] for step in told["steps"]] == ["1f1b"] + 8 * ["dualpipe"]


@pytest.mark.parametrize("gigabytes", ["0.001", "1e6"])
@pytest.mark.parametrize("args", [DUAL, [*V3, "--serve"]], ids=["train", "serve"])
def test_every_figure_is_finite_at_the_bounds_of_what_can_be_asked(capsys, args, gigabytes):
    links = ["--what-if.ib", gigabytes, "--what-if.nvlink", gigabytes]
    told = json.loads(out_of(capsys, *args, *links, "--price", "1e6", "--json"))
    assert all(math.isfinite(line["value"]) for line in told["lines"])


def test_flags_override_the_file(capsys):
    def step(*args: str) -> float:
        told = json.loads(out_of(capsys, *TINY, *args, "--json"))
        return next(line["value"] for line in told["lines"] if line["label"] == "step")

    assert step("--train.rows", "16") > step()
    assert step("--quant.recipe", "fp8") != step()
    assert step("--hardware", "h200") <= step()


def test_a_stage_with_little_to_do_is_drawn_too(tmp_path, capsys):
    path = tmp_path / "step.svg"
    stages = "E|4|4|H+M"
    args = [*DUAL, "--pipeline.stages", stages, "--pipeline.schedule", "zb1p"]
    assert out_of(capsys, *args, "--timeline", str(path))
    assert path.stat().st_size > 1000


def test_a_dense_model_has_no_exchange(capsys):
    args = [*TINY, "--model.num-dense-layers", "8", "--model.mtp-depth", "0", "--mesh.local", "2"]
    labels = [line["label"] for line in json.loads(out_of(capsys, *args, "--json"))["lines"]]
    assert "step" in labels
    assert not any("exchange" in label for label in labels)


def test_money_is_named_or_asked_for(capsys):
    assert "no price of h100 is known: see --price" in out_of(capsys, *TINY, "--hardware", "h100")
    priced = out_of(capsys, *TINY, "--hardware", "h100", "--price", "3")
    assert "device-hours × $3" in priced
    assert "no price" not in priced


def test_a_step_is_drawn(tmp_path, capsys):
    path = tmp_path / "step.png"
    assert f"picture: {path}" in out_of(capsys, *DUAL, "--timeline", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_mistake():
    """As `head` does: exit code 141, without a word."""
    command = [sys.executable, "-m", "dsv3_jax.plan", *TINY]
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=CONFIGS.parent)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, b"")


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_full_disk_behind_stdout_is_one_line(more):
    command = [sys.executable, "-m", "dsv3_jax.plan", *TINY, *more]
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, cwd=CONFIGS.parent)
    assert ended.returncode == 2
    assert ended.stderr == b"error: stdout: No space left on device\n"


@pytest.mark.slow
def test_a_terminal_that_knows_ascii_alone_is_told_as_much():
    """In another process: the encoding is the interpreter's."""
    command = [sys.executable, "-m", "dsv3_jax.plan", *TINY]
    ascii_alone = os.environ | {"PYTHONIOENCODING": "ascii"}
    told = subprocess.run(command, env=ascii_alone, capture_output=True, cwd=CONFIGS.parent)
    assert (told.returncode, told.stderr) == (0, b"")
    assert b"tokens/s of a device" in told.stdout


def test_this_machine_is_measured():
    one, eight = measured_cpu(1), measured_cpu(8)
    assert 1e8 < one.gemm_bf16.value < 1e15
    assert 1e7 < one.streamed.value < 1e13
    assert eight.memory.value == pytest.approx(one.memory.value / 8)
    assert one.price is None


def test_a_plan_for_this_machine(capsys, monkeypatch):
    monkeypatch.setattr("dsv3_jax.plan.cpu_probe._best", lambda run, times=5: 0.01)
    text = out_of(capsys, *TINY, "--hardware", "cpu", "--quant.recipe", "f32")
    assert "measured here" in text
    assert "no price of cpu is known" in text


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ([*TINY, "--hardware", "tpu"], "--hardware is 'tpu'; allowed: h800, h100, h200, cpu"),
        ([*TINY, "--mesh.local", "3"], "model.num_experts is 16; allowed: multiples of the 3"),
        ([*TINY, "--mesh.local", "16"], "train.rows / train.microbatches is 8; allowed"),
        (
            [*V3, "--train.microbatches", "30"],
            "pipeline.schedule, with train.microbatches: dualpipe on 16 ranks",
        ),
        (
            [*TINY, "--train.rows", "300000", "--train.microbatches", "300000"],
            "mesh.pipe 1 times train.microbatches 300,000 is too large to simulate; allowed: up to",
        ),
        ([*V3, "--pipeline.stages", "E+61+H+M"], "pipeline.stages: 'E+61+H+M' has 1 stage;"),
        ([*V3, "--quant.recipe", "f32"], "train.dtype is float32; allowed with --hardware h800"),
        ([*V3, "--what-if.comm-sms", "132"], "--what-if.comm-sms is 132; allowed: 0 to 131"),
        ([*V3, "--what-if.ib", "nan"], "--what-if.ib is nan; allowed: 0.001 to 1,000,000"),
        ([*V3, "--json", "--what-if.ib", "1e-300"], "--what-if.ib is 1e-300; allowed: 0.001 to"),
        ([*V3, "--what-if.nvlink", "1e308"], "--what-if.nvlink is 1e+308; allowed: 0.001 to"),
        (
            [*V3, "--what-if.accumulator-bits", "40"],
            "--what-if.accumulator-bits is 40; allowed: 12",
        ),
        (
            [*V3, "--what-if.accumulator-bits", "16", "--search"],
            "--what-if.accumulator-bits and --search; allowed: one of them",
        ),
        (
            [*V3, "--what-if.group-scales", "--serve"],
            "--what-if.group-scales and --serve; allowed: one of them",
        ),
        ([*V3, "--price", "-2"], "--price is -2; allowed: 0 to 1,000,000"),
        ([*V3, "--json", "--price", "1e308"], "--price is 1e+308; allowed: 0 to 1,000,000"),
        ([*V3, "--serve", "--price", "nan"], "--price is nan; allowed: 0 to 1,000,000"),
        ([*V3, "--serve", "--serving.batch", "0"], "--serving.batch is 0; allowed: 1 to 2,147"),
        ([*V3, "--serve", "--serving.prompt", "1"], "--serving.prompt is 1; allowed: 2 to 2,147"),
        ([*V3, "--serve", "--serving.batch", "900"], "259.7 GB more than h800 has"),
        ([*V3, "--serve", "--timeline", "a.png"], "--timeline and --serve"),
        ([*V3, "--timeline", "a.jpg"], "--timeline is a.jpg; allowed: a file that ends in"),
        (["--config", ""], "--config is ''; allowed: a Python file with config()"),
        (["--config", "nowhere.py"], "--config nowhere.py: no such file"),
        ([*TINY, "--serving.speed", "3"], "Unrecognized options: --serving.speed"),
        (["--ranks", "4"], "nothing to plan; allowed: --config FILE for a run, --schedule NAME"),
    ],
)
def test_every_mistake_is_one_line(args, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert line in mistake_of(main, args, capsys)
    assert not list(tmp_path.iterdir())


def test_cpu_cannot_be_asked_about_serving(monkeypatch, capsys):
    monkeypatch.setattr("dsv3_jax.plan.cpu_probe._best", lambda run, times=5: 0.01)
    line = mistake_of(main, [*TINY, "--hardware", "cpu", "--serve"], capsys)
    assert "allowed: h800, h100, h200" in line
