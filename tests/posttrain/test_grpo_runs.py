"""A run on its own answers on meshes, over pipelines, in FP8 and in several processes; killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.checkpoint import store
from tests.reinforcing import FLAGS, REWARDS, Reinforcing, told, without_pictures
from tests.runs import train_environment
from tests.tuning import MESHES, assert_same_arrays, entries_of

# In float32 a mesh's rounding may choose another token, if rarely: two steps on one batch.
STEPS = ("--train.steps", 2, "--train.rows", 4)
KINDS = MESHES | {
    "pipeline": (
        *("--train.microbatches", 2, "--mesh.pipe", 2, "--model.mtp-depth", 1),
        *("--pipeline.schedule", "1f1b", "--pipeline.stages", "E+1|H+M"),
    ),
    "dualpipe": (
        *("--train.microbatches", 4, "--mesh.pipe", 2, "--model.mtp-depth", 1),
        *("--pipeline.schedule", "dualpipe", "--pipeline.stages", "E+1|H+M"),
    ),
}


@pytest.fixture(scope="module")
def reinforcing(tmp_path_factory: pytest.TempPathFactory) -> Reinforcing:
    made = Reinforcing(tmp_path_factory.mktemp("grpo"))
    made.make()
    return made


@pytest.fixture(scope="module")
def plain(reinforcing: Reinforcing) -> Path:
    """On one device."""
    with without_pictures():
        assert reinforcing.begin(reinforcing.home / "plain", *STEPS) == 0
    return reinforcing.home / "plain" / "grpo-001"


def measured(run: Path) -> np.ndarray:
    """Of each step: reward, divergence, objective, ratio, loss."""
    entries = entries_of(run, "train")
    inner = [[e["grpo"][name] for name in ("objective", "ratio")] for e in entries]
    outer = [[e[name] for name in ("reward", "kl", "main_loss")] for e in entries]
    return np.concatenate([inner, outer], 1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_the_same_on_every_mesh(
    reinforcing: Reinforcing, plain: Path, tmp_path: Path, kind: str
):
    with without_pictures():
        assert reinforcing.begin(tmp_path, *STEPS, *KINDS[kind]) == 0
    run = tmp_path / "grpo-001"
    np.testing.assert_allclose(measured(run), measured(plain), rtol=2e-3, atol=1e-5)
    assert max(e["grpo"]["drift_most"] for e in entries_of(run, "train")) < 1e-4


@pytest.mark.exhaustive
def test_a_run_in_fp8_tells_how_far_the_engine_is_off(reinforcing: Reinforcing, tmp_path: Path):
    """With random weights far: an answer of six is left out, and the others teach."""
    more = ("--quant.recipe", "fp8", "--train.steps", 1)
    with without_pictures():
        assert reinforcing.begin(tmp_path, *more) == 0
    (entry,) = entries_of(tmp_path / "grpo-001", "train")
    assert 1e-4 < entry["grpo"]["drift"] < 1
    assert entry["grpo"]["drift_most"] > 0.5
    assert 0 < entry["grpo"]["left_out"] <= 0.5
    assert entry["main_loss"] != 0
    assert np.isfinite(measured(tmp_path / "grpo-001")).all()


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_a_killed_run_goes_on_bit_for_bit(reinforcing: Reinforcing, tmp_path: Path):
    """SIGKILL between two updates on a batch, whatever was written then."""
    given = ("--init-from", reinforcing.model, "--prompts", reinforcing.prompts, *FLAGS, *REWARDS)
    given += ("--train.steps", 8, "--updates", 4, "--output.save-every", 1)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert _process(reinforcing.home, *given, "--output.folder", whole).wait() == 0
    process = _process(reinforcing.home, *given, "--output.folder", killed)
    run = killed / "grpo-001"
    while len(store.steps(run / "checkpoints")) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(entries_of(run, "train")) < 8
    assert _process(reinforcing.home, "--resume", run).wait() == 0
    assert [e for e in told(run) if e["kind"] == "train"] == [
        e for e in told(whole / "grpo-001") if e["kind"] == "train"
    ]
    assert_same_arrays(run, whole / "grpo-001", 8)


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_two_processes_learn_as_one(reinforcing: Reinforcing, plain: Path, tmp_path: Path):
    given = ("--init-from", reinforcing.model, "--prompts", reinforcing.prompts, *FLAGS, *REWARDS)
    given += (*STEPS, "--mesh.local", 2, "--launch.processes", 2, "--output.folder", tmp_path)
    assert _process(reinforcing.home, *given).wait() == 0
    run = tmp_path / "grpo-001"
    np.testing.assert_allclose(measured(run), measured(plain), rtol=2e-3, atol=1e-5)


def _process(home: Path, *args: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "dsv3_jax.grpo", *map(str, args)],
        cwd=Path(__file__).parents[2],
        env=os.environ | train_environment(home),
        stdout=subprocess.DEVNULL,
    )
