"""The package as users meet it (lazy names, no JAX on import, make), and the strict test room."""

import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv3_jax
from tests.tolerances import FLOAT32, assert_close

ROOT = Path(__file__).parents[1]
needs_make = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


@pytest.mark.parametrize("module", ["dsv3_jax", "dsv3_jax.config"])
def test_importing_loads_no_jax(module: str):
    code = f"import sys, {module}; print(*sys.modules)"
    python = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    loaded = {name.partition(".")[0] for name in python.stdout.split()}
    assert "dsv3_jax" in loaded, python.stderr
    assert loaded.isdisjoint({"jax", "jaxlib", "flax", "optax", "orbax", "chex", "grain"})


@pytest.mark.parametrize("name", [n for n in dsv3_jax.__all__ if n != "__version__"])
def test_a_public_name_is_the_object_of_its_home(name: str):
    value = getattr(dsv3_jax, name)
    assert value.__name__ == name
    assert getattr(sys.modules[value.__module__], name) is value


def test_public_names_are_listed():
    assert set(dsv3_jax.__all__) <= set(dir(dsv3_jax))


def test_an_unknown_name_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="'DeepSeekV4'"):
        _ = dsv3_jax.DeepSeekV4


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make in the repository's root, whatever make may have started these tests."""
    command = ["env", "-u", "MAKEFLAGS", "-u", "MAKELEVEL", "make", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@needs_make
def test_make_explains_every_target_by_default():
    declared = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.M)[
        1
    ].split()
    explained = [line.split()[1] for line in make().stdout.splitlines()]
    assert {"train", "test", "test-slow", "test-all", "bench", "lint", "clean"} <= set(declared)
    assert sorted(explained) == sorted(declared)


@needs_make
def test_an_old_python_is_refused_in_one_line_before_anything_is_made(tmp_path: Path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.18\nexit 1\n')
    old.chmod(0o755)
    refused = make("test", f"PYTHON={old}", f"VENV={tmp_path}/venv")
    lines = [line for line in refused.stderr.splitlines() if not line.startswith("make")]
    assert refused.returncode != 0
    assert len(lines) == 1
    assert "Python >= 3.11" in lines[0]
    assert "3.9.18" in lines[0]
    assert not (tmp_path / "venv").exists()


# --- the test room: each of its promises is seen to hold ---


def test_there_are_eight_devices_of_one_platform():
    assert len({d.platform for d in jax.devices()}) == 1
    assert len(jax.devices("cpu")) == 8


def test_implicit_broadcasting_and_warnings_are_errors():
    with pytest.raises(ValueError, match="rank_promotion"):
        _ = jnp.ones((2, 3)) + jnp.ones(3)
    with pytest.raises(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)


def test_float64_is_on_for_the_test_that_asks(x64: None):
    assert jnp.ones(2).dtype == np.float64


def test_float64_is_off_otherwise():
    assert jnp.ones(2).dtype == np.float32


def test_implicit_casts_are_refused_where_asked(strict_dtypes: None):
    with pytest.raises(ValueError, match="promotion"):
        _ = jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.bfloat16)


@pytest.mark.parametrize(
    "actual",
    [
        {"w": np.array([1.0, 100.0 + 1e-2])},  # beyond the tolerance of the largest element
        {"w": np.array([1.0, np.nan])},
        {"w": np.ones((2, 1))},
        {"v": np.array([1.0, 100.0])},
    ],
)
def test_assert_close_refuses(actual: dict[str, np.ndarray]):
    with pytest.raises(AssertionError):
        assert_close(actual, {"w": np.array([1.0, 100.0])}, FLOAT32)


def test_assert_close_measures_against_the_largest_element():
    close = {"w": np.array([1.0 + 1e-3, 100.0]), "zero": jnp.zeros(2, jnp.bfloat16), "none": None}
    exact = {"w": np.array([1.0, 100.0]), "zero": jnp.zeros(2, jnp.bfloat16), "none": None}
    assert_close(close, exact, FLOAT32)
    with pytest.raises(AssertionError):
        assert_close(close | {"zero": np.full(2, 1e-30)}, exact, FLOAT32)
