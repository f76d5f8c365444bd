"""What can be known of experiments without running them: commands, write-ups, arithmetic."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.config.presets import tiny_run

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted(path.parent for path in (ROOT / "experiments").glob("*/run.py"))


def test_there_are_experiments():
    assert len(EXPERIMENTS) >= 4


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda folder: folder.name)
def test_an_experiment_has_a_question_a_command_figures_and_a_verdict(folder: Path):
    text = (folder / "README.md").read_text()
    assert f"python experiments/{folder.name}/run.py" in text
    for part in ("**Question.**", "**Command.**", "**Verdict.**", "| --- |"):
        assert part in text
    said = ast.get_docstring(ast.parse((folder / "run.py").read_text()))
    assert f"    python experiments/{folder.name}/run.py" in said


# In one process, which loads JAX once. What a script found beside itself goes before the next one:
# each must find its own.
HELP = """
import runpy, sys
from pathlib import Path
path = list(sys.path)
for script in sys.argv[1:]:
    print(f"\\n{script}", flush=True)
    sys.argv = [script, "--help"]
    sys.path[0] = str(Path(script).parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise
    sys.path[:] = path
    for name, module in list(sys.modules.items()):
        if "/experiments/" in str(getattr(module, "__file__", "")):
            del sys.modules[name]
"""


def test_help_of_every_experiment_ends_well():
    scripts = [str(folder / "run.py") for folder in EXPERIMENTS]
    command = [sys.executable, "-c", HELP, *scripts]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout
    for script, after in zip(scripts, [*scripts[1:], None], strict=True):
        _, _, said = said.partition(f"\n{script}\n")
        assert "usage:" in said.partition(f"\n{after}\n")[0], script


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch):
    """As for a script that lies in a folder below."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    import curves

    return curves


def test_errors_are_of_running_means(curves, tmp_path: Path):
    for name, losses in (("a", [4.0, 2.0, 2.0]), ("b", [4.0, 3.0, 2.0])):
        (tmp_path / name).mkdir()
        entries = [
            {"kind": "train", "step": i + 1, "main_loss": loss} for i, loss in enumerate(losses)
        ]
        lines = [json.dumps(entry) for entry in [*entries, {"kind": "validation", "step": 3}]]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines))
    np.testing.assert_allclose(curves.smoothed(np.array([4.0, 2.0, 2.0])), [4, 3.8, 3.62])
    error = curves.relative_error(tmp_path / "b", tmp_path / "a")
    np.testing.assert_allclose(error, [0, 0.1 / 3.8, 0.09 / 3.62])


def test_a_folder_of_another_run_is_refused_in_a_line(tmp_path: Path):
    (tmp_path / "bf16-001").mkdir()
    other = tiny_run().to_json()
    (tmp_path / "bf16-001" / "config.json").write_text(other)
    command = [sys.executable, "experiments/fp8_vs_bf16/run.py", "--folder", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.strip().endswith("allowed: another --folder")
    assert "Traceback" not in ended.stderr


def test_a_run_that_is_not_there_is_told_in_a_line(tmp_path: Path):
    command = [sys.executable, "experiments/formats/run.py", "--run", str(tmp_path / "gone")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "gone" in ended.stderr
    assert "Traceback" not in ended.stderr
