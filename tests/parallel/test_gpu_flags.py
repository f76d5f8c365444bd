"""XLA's flags for GPUs: this jaxlib takes those of its row, the user's win, CPUs get none."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax.parallel import gpu_flags
from dsv3_jax.parallel.gpu_flags import FLAGS, JAXLIBS, known, with_flags

INSTALLED = importlib.metadata.version("jaxlib")
LATENCY = "xla_gpu_enable_latency_hiding_scheduler"


def array_made_with(flags: str) -> subprocess.CompletedProcess[str]:
    """What becomes of a process that makes an array on the CPU. XLA reads the flags of all
    platforms then.
    """
    return subprocess.run(
        [sys.executable, "-c", "import jax.numpy as jnp; print(jnp.ones(1).sum())"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )


def test_this_jaxlib_takes_every_flag_of_its_row():
    flags = with_flags("", INSTALLED)
    if not flags:
        pytest.skip(f"the table has no row for jaxlib {INSTALLED}: nothing is set there")
    ended = array_made_with(flags)
    assert (ended.returncode, ended.stdout) == (0, "1.0\n"), ended.stderr


def test_a_flag_that_xla_does_not_know_ends_the_process():
    """Or the test above would show nothing."""
    ended = array_made_with("--xla_gpu_no_such_flag=true")
    assert ended.returncode != 0
    assert "xla_gpu_no_such_flag" in ended.stderr


def test_flags_are_set_for_the_versions_they_were_tried_with_alone():
    for jaxlib in JAXLIBS:
        assert [flag.name for flag in known(jaxlib)] == [flag.name for flag in FLAGS]
    assert [*known("0.12.0.1")] == [*known("0.12.0")]
    for untried in ("0.10.20", "0.11.1", "0.12.01", "0.13.0"):
        assert not [*known(untried)]
        assert with_flags("--xla_own=1", untried) == "--xla_own=1"


@pytest.mark.parametrize(
    "own", [f"--{LATENCY}=false --xla_dump_to=x", f"--xla_dump_to=x --{LATENCY}"]
)
def test_flags_of_the_users_own_win(own: str):
    flags = with_flags(own, JAXLIBS[0])
    assert flags.startswith(own)
    assert flags.count(f"--{LATENCY}") == 1
    assert flags.count("--") == 1 + len(FLAGS)
    assert with_flags(flags, JAXLIBS[0]) == flags


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of devices with one GPU in it, and JAX's plugin for it."""
    monkeypatch.setattr(gpu_flags.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(gpu_flags, "DEVICES", tmp_path)
    (tmp_path / "nvidia3").touch()
    return tmp_path / "nvidia3"


def applied(**environment: str) -> str | None:
    gpu_flags.apply(environment)
    return environment.get("XLA_FLAGS")


@pytest.mark.parametrize("platforms", [{}, {"JAX_PLATFORMS": "cuda,cpu"}, {"JAX_PLATFORMS": ""}])
def test_a_command_that_finds_a_gpu_sets_them(
    gpu: Path, monkeypatch: pytest.MonkeyPatch, platforms: dict[str, str]
):
    monkeypatch.setattr(gpu_flags, "_jaxlib", lambda: JAXLIBS[-1])
    assert applied(**platforms) == with_flags("", JAXLIBS[-1]) != ""
    assert applied(**platforms, XLA_FLAGS="--x=1") == with_flags("--x=1", JAXLIBS[-1])


def test_on_a_cpu_nothing_is_set(gpu: Path, monkeypatch: pytest.MonkeyPatch):
    assert applied(JAX_PLATFORMS="cpu") is None
    assert applied(JAX_PLATFORMS="cpu", XLA_FLAGS="--x=1") == "--x=1"
    monkeypatch.setattr(gpu_flags.importlib.util, "find_spec", lambda name: None)
    assert applied() is None  # a GPU, and no plugin
    gpu.rename(gpu.with_name("nvidiactl"))
    monkeypatch.setattr(gpu_flags.importlib.util, "find_spec", lambda name: name)
    assert applied() is None  # the plugin, and no GPU
