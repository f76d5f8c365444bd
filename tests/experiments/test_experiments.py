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


def test_help_of_every_experiment_ends_well():
    commands = [[sys.executable, folder / "run.py", "--help"] for folder in EXPERIMENTS]
    started = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for command in commands
    ]
    for process in started:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert "usage:" in said


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
