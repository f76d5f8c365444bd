"""Whole runs in several processes: those of one process within rounding, themselves bit for bit,
also when one of them was killed; and what they say when something is wrong.
"""

import os
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.checkpoint import store
from dsv3_jax.train.__main__ import main
from dsv3_jax.train.lockstep import Lockstep
from dsv3_jax.train.sharding import ONE_DEVICE
from tests.parallel.test_launch import children, gone
from tests.runs import SmallRun, jax_option, timeless, train_process
from tests.tolerances import FLOAT32, assert_close
from tests.train.test_mesh_runs import losses_of

ROOT = Path(__file__).parents[2]
ONE_LAYER = ("--model.num_layers", 1, "--model.num_dense_layers", 0, "--model.mtp_depth", 0)
OFTEN = ("--output.log_every", 1, "--output.save_every", 2, "--output.sample_tokens", 0)
EVERY_STEP = (*OFTEN, *ONE_LAYER)  # few layers: each process compiles for itself
DATA = ("--train.rows", 4, "--mesh.data", 2, "--mesh.local", 2)
PIPE = ("--train.rows", 8, "--train.microbatches", 4, "--mesh.pipe", 2)
NODE = ("--train.rows", 4, "--mesh.node", 2, "--mesh.local", 2)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled programs are kept for the runs of this file."""
    return tmp_path_factory.mktemp("programs")


def finished(programs: Path, *args: object) -> str:
    """What a run prints that ends well."""
    out, error = (run := train_process(programs, *args)).communicate(timeout=500)
    assert (run.returncode, error) == (0, "")
    return out


def wait_for_step(run: subprocess.Popen, step: int) -> None:
    for line in run.stdout:
        if re.match(rf" *{step}/\d+ ", line):
            return


@pytest.mark.slow
def test_two_processes_are_one_and_go_on_exactly_after_a_kill(
    small: SmallRun, tmp_path: Path, programs: Path
):
    """`data` spans them. The run that is compared with is the same in one process."""
    mesh = ("--train.rows", 4, "--mesh.data", 2)
    common = ("--config", small.config, "--output.folder", tmp_path, *mesh, *EVERY_STEP)
    with train_process(programs, *common, "--launch.processes", 2) as killed:
        wait_for_step(killed, 5)
        pids = children(killed.pid)
        os.kill(pids[1], signal.SIGKILL)
        _, error = killed.communicate(timeout=30)
    run = tmp_path / "small-001"
    assert killed.returncode == 137
    assert error == (
        "error: process 1 of 2 was ended by SIGKILL; the others were stopped; go on with "
        f"--resume {run}\n"
    )
    assert gone(pids)
    told = finished(programs, "--resume", run, "--launch.processes", 2)
    assert "resumed after step 4" in told
    with jax_option("jax_disable_most_optimizations"):
        assert main(list(map(str, common))) == 0
    found, wanted = (losses_of(tmp_path / name) for name in ("small-001", "small-002"))
    assert len(found) == len(wanted) > 12
    assert_close(np.array(found), np.array(wanted), 10 * FLOAT32)


@pytest.mark.slow
def test_a_pipeline_spans_two_processes(small: SmallRun, tmp_path: Path, programs: Path):
    """One rank in each. The second half goes on without a pipeline."""
    common = ("--config", small.config, "--output.folder", tmp_path, *PIPE, *EVERY_STEP)
    finished(programs, *common, "--launch.processes", 2, "--train.steps", 4)
    whole = ("--mesh.pipe", 1)
    with jax_option("jax_disable_most_optimizations"):
        assert (
            main(
                ["--resume", str(tmp_path / "small-001"), "--train.steps", "6", "--mesh.pipe", "1"]
            )
            == 0
        )
        assert main(list(map(str, (*common, *whole)))) == 0
    found, wanted = (losses_of(tmp_path / name) for name in ("small-001", "small-002"))
    assert_close(np.array(found)[-4:], np.array(wanted)[-4:], 10 * FLOAT32)


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("mesh", "count", "options"),
    [
        (DATA, 2, ("--optimizer.ema_decay", 0.5, "--output.sample_tokens", 4)),
        (DATA, 4, ("--data.isolate",)),
        (NODE, 2, ()),
        (NODE, 4, ("--quant.recipe", "fp8", "--optimizer.ema_decay", 0.5)),
        (("--train.rows", 4, "--mesh.local", 4), 2, ("--quant.recipe", "fp8")),
        ((*PIPE, "--mesh.local", 2), 2, ("--optimizer.ema_decay", 0.5)),
        ((*PIPE, "--mesh.node", 2), 4, ("--quant.recipe", "fp8")),
        (
            ("--train.rows", 8, *PIPE[2:4], "--mesh.pipe", 4),
            4,
            ("--pipeline.schedule", "zb1p", "--model.num_layers", 2),  # a cut item for each rank
        ),
    ],
)
def test_every_run_is_itself_and_that_of_one_process(
    small: SmallRun, tmp_path: Path, programs: Path, mesh: tuple, count: int, options: tuple
):
    """Uninterrupted, killed, and stopped by a signal to one process: bit for bit the same run."""
    common = ("--config", small.config, *mesh, *EVERY_STEP, *options)
    several = ("--launch.processes", count)
    names = "whole", "killed", "stopped", "one"
    whole, killed, stopped, one = (tmp_path / name for name in names)
    finished(programs, *common, *several, "--output.folder", whole)
    with train_process(programs, *common, *several, "--output.folder", killed) as run:
        wait_for_step(run, 5)
        os.kill(children(run.pid)[count - 1], signal.SIGKILL)
        run.communicate(timeout=300)
    assert run.returncode == 137
    with train_process(programs, *common, *several, "--output.folder", stopped) as run:
        wait_for_step(run, 2)
        os.kill(children(run.pid)[1], signal.SIGTERM)
        out, error = run.communicate(timeout=300)
    assert (run.returncode, error) == (143, "")
    assert "SIGTERM: saved step" in out
    for folder in (killed, stopped):
        finished(programs, "--resume", folder / "small-001", *several)
        assert timeless(folder / "small-001") == timeless(whole / "small-001")
        for step in (2, 4, 6):
            same = (store.load(f / "small-001" / "checkpoints", step) for f in (folder, whole))
            found, wanted = (checkpoint.arrays for checkpoint in same)
            for group, named in wanted.items():
                for name, array in named.items():
                    assert np.array_equal(found[group][name], array), f"{group}/{name}"
    finished(programs, *common, "--devices", 4, "--output.folder", one)
    found, wanted = (losses_of(folder / "small-001") for folder in (whole, one))
    assert len(found) == len(wanted) > 12
    assert_close(np.array(found), np.array(wanted), 10 * FLOAT32)


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_a_checkpoint_of_any_number_of_processes_goes_on_in_any_other(
    small: SmallRun, tmp_path: Path, programs: Path
):
    """4 -> 2 on another mesh -> one device -> 4. A run that starts from weights saves them first,
    so they can be compared; one that is resumed needs its moments, too.
    """
    common = ("--config", small.config, "--output.folder", tmp_path, *NODE, *EVERY_STEP)
    finished(programs, *common, "--launch.processes", 4)
    on_two = ("--mesh.node", 1, "--mesh.data", 2, "--mesh.local", 2, "--launch.processes", 2)
    on_one = ("--mesh.node", 1, "--mesh.data", 1, "--mesh.local", 1)
    on_four = ("--mesh.node", 2, "--mesh.data", 1, "--mesh.local", 2, "--launch.processes", 4)
    for number, mesh in enumerate((on_two, on_one, on_four), 1):
        source, new = (tmp_path / f"small-{i:03d}" for i in (number, number + 1))
        finished(programs, "--init-from", source, *mesh, "--output.folder", tmp_path)
        before, after = store.load(source / "checkpoints"), store.load(new / "checkpoints", 0)
        for group in ("params", "router_bias"):
            for name, array in before.arrays[group].items():
                assert np.array_equal(after.arrays[group][name], array), name
        finished(programs, "--resume", source, *mesh, "--train.steps", before.step + 1)
        assert store.load(source / "checkpoints").step == before.step + 1


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_what_one_device_does_is_done_by_the_first_process(
    small: SmallRun, tmp_path: Path, programs: Path
):
    """--profile, --debug-nans with a bad row, a batch ramp's rows, weights from elsewhere."""
    common = ("--config", small.config, "--output.folder", tmp_path, *DATA)
    several = ("--launch.processes", 2)
    finished(programs, *common, *several, "--profile", "2:3")
    assert list((tmp_path / "small-001" / "profile").rglob("*.xplane.pb"))
    finished(programs, "--init-from", tmp_path / "small-001", *several, "--output.folder", tmp_path)
    assert store.steps(tmp_path / "small-002" / "checkpoints")[0] == 0
    rate = ("--schedule.learning_rate", 1e20, "--schedule.final_learning_rate", 0)
    out, error = (
        run := train_process(programs, *common, *several, *rate, "--debug-nans")
    ).communicate()
    assert (run.returncode, error) in [(0, ""), (3, "")], out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--launch.processes", 0), "launch.processes is 0; allowed: 1 to 256"),
        (("--launch.processes", 3, *DATA), "launch.processes is 3, which does not divide the 4"),
        (("--launch.processes", 2, "--train.steps", 0), "train.steps is 0; allowed: at least 1"),
        (
            ("--launch.processes", 2, *DATA, "--data.source", "none"),
            "data.source 'none': no file matches",
        ),
    ],
)
def test_mistakes_are_one_line(
    small: SmallRun, tmp_path: Path, programs: Path, options: tuple, said: str
):
    args = ("--config", small.config, "--output.folder", tmp_path / "runs", *options)
    _, error = (run := train_process(programs, *args)).communicate(timeout=100)
    assert run.returncode == 2
    (line,) = error.splitlines()
    assert line.startswith("error: " + said)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


# --- in one process ------------------------------------------------------------------------------


def test_one_process_shares_nothing():
    lockstep, metrics = Lockstep(ONE_DEVICE), object()
    assert lockstep.share(metrics) == (metrics, None)
    lockstep.take(None)
    assert lockstep.stopped_by is None


def test_one_process_has_all_rows():
    assert list(ONE_DEVICE.own_rows(5)) == [0, 1, 2, 3, 4]
