"""A run killed at random moments and resumed each time has the curve of the uninterrupted one."""

import random
import re
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dsv3_jax.checkpoint import store
from dsv3_jax.config import Phase
from tests.runs import SmallRun, assert_same_checkpoint, timeless, train_process, write_config

ROOT = Path(__file__).parents[2]
STEPS = 120


def wait_for_steps(run: subprocess.Popen, count: int) -> None:
    """Until it has its folder and has told of so many steps."""
    told = 0
    for line in run.stdout:
        told += bool(re.match(r" *\d+/\d+ ", line))
        if ("steps" in line and not count) or told == count:
            return


def finished(run: subprocess.Popen) -> None:
    _, error = run.communicate()
    assert (run.returncode, error) == (0, "")


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(2, marks=pytest.mark.slow),
        pytest.param(20, marks=[pytest.mark.exhaustive, pytest.mark.timeout(3600)]),
    ],
)
def test_a_killed_and_resumed_run_has_the_curve_of_the_uninterrupted_one(
    small: SmallRun, tmp_path: Path, kills: int
):
    """With fill-in-the-middle, a batch ramp over a quarter of the steps, averaged weights, and few
    checkpoints kept.
    """
    cfg = small.cfg
    cfg = replace(
        cfg,
        data=replace(cfg.data, fim_rate=0.5),
        train=replace(cfg.train, steps=STEPS, microbatches=2),
        optimizer=replace(cfg.optimizer, ema_decay=0.9),
        schedule=replace(cfg.schedule, rows_phases=(Phase(0, STEPS * 4, 1),)),
        output=replace(
            cfg.output,
            log_every=1,
            eval_every=STEPS,
            save_every=STEPS // 20,
            keep_last=2,
            keep_every=STEPS // 4,
            sample_tokens=0,
        ),
    )
    write_config(tmp_path / "long.py", cfg)
    start = ("--config", tmp_path / "long.py", "--output.folder")
    finished(train_process(tmp_path, *start, tmp_path / "whole"))

    folder, moments = tmp_path / "parts", random.Random(kills)
    run, args = folder / "small-001", (*start, folder)
    for _ in range(kills):
        with train_process(tmp_path, *args) as killed:
            # Some steps on, before or after the first checkpoint, and a moment into the next ones.
            wait_for_steps(killed, moments.randint(0, STEPS // kills))
            time.sleep(moments.uniform(0, 0.1))
            killed.send_signal(signal.SIGKILL)
        args = ("--resume", run)
    finished(train_process(tmp_path, *args))

    whole = tmp_path / "whole" / "small-001"
    assert timeless(run) == timeless(whole)
    for path in (run, whole):
        left = sorted(path.name for path in (path / "checkpoints").iterdir())
        assert left == [f"step_{step:08d}" for step in (30, 60, 90, 114, 120)]
    last = store.load(whole / "checkpoints", STEPS)
    last.meta["config"]["output"]["folder"] = str(folder)
    store.save(whole / "checkpoints", STEPS, last.arrays, last.meta)
    assert_same_checkpoint(run, whole, STEPS)
