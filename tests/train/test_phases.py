"""A next phase of a run: its weights, and if asked for its moments, with longer rows and YaRN."""

from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.checkpoint import store
from dsv3_jax.config.load import load_json
from dsv3_jax.convert import main as convert
from tests.runs import SmallRun

LONGER = ("--data.length", 32, "--model.yarn.original_length", 16, "--model.yarn.factor", 2.5)


def test_a_next_phase_begins_with_weights_and_moments(small: SmallRun, finished: Path, tmp_path):
    start = ("--init-from", finished, "--output.folder", tmp_path, "--train.steps", 2, *LONGER)
    assert small.train(*start, "--init-moments") == 0
    cfg = load_json(tmp_path / "small-001" / "config.json")
    assert cfg.model.yarn_active
    assert cfg.data.length == 32
    before = store.load(finished / "checkpoints")
    after = store.load(tmp_path / "small-001" / "checkpoints", step=0)
    assert (before.step, after.step) == (6, 0)
    for group in ("params", "router_bias", "mu", "nu"):
        assert before.arrays[group].keys() == after.arrays[group].keys()
        for name, wanted in before.arrays[group].items():
            np.testing.assert_array_equal(after.arrays[group][name], wanted, err_msg=name)
    assert after.meta["updates"] == before.meta["updates"] == 6
    assert "and moments of step 6" in (tmp_path / "small-001" / "metrics.jsonl").read_text()


def test_without_them_moments_are_new(small: SmallRun, finished: Path, tmp_path: Path):
    start = ("--init-from", finished, "--output.folder", tmp_path, "--train.steps", 1, *LONGER)
    assert small.train(*start) == 0
    after = store.load(tmp_path / "small-001" / "checkpoints", step=0)
    assert not any(np.any(x) for x in after.arrays["mu"].values())
    assert after.meta["updates"] == 0


def test_moments_of_nothing_are_refused(small: SmallRun, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        small.train("--config", small.config, "--init-moments")
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: --init-moments: moments of what? allowed: with --init-from a run"


@pytest.mark.slow
def test_a_model_from_elsewhere_has_no_moments(
    small: SmallRun, finished: Path, capsys: pytest.CaptureFixture, tmp_path: Path
):
    folder, imported = tmp_path / "hf", tmp_path / "imported"
    assert not convert(["export", str(finished), str(folder)])
    assert not convert(["import", str(folder), str(imported)])
    for model in (folder, imported):
        start = ("--config", small.config, "--init-from", model, "--output.folder", tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            small.train(*start, "--init-moments")
        assert stop.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line == f"error: --init-moments: {model} has none; allowed: a run that was trained"
