"""The machine's figures: matmul peak, description, memory."""

import os
import platform
import sys

import jax
import numpy as np
import pytest

from dsv3_jax.train import machine


@pytest.mark.parametrize("dtype", machine.DTYPES)
def test_matmul_peak_measures_every_dtype_of_training(dtype, monkeypatch):
    monkeypatch.setattr(machine, "SECONDS_PER_SIDE", 0.01)
    before = jax.config.jax_enable_x64
    peak = machine.matmul_peak(dtype, sides=(128,))
    assert 1e7 < peak < 1e16  # FLOP/s, from a busy single core to beyond any accelerator
    assert jax.config.jax_enable_x64 == before


def test_matmul_peak_is_the_best_rate_over_the_sides(monkeypatch):
    seconds = {100: 1.0, 200: 4.0, 300: 1e3}
    monkeypatch.setattr(machine, "_fastest", lambda dtype, side: seconds[side])
    assert machine.matmul_peak("float32", sides=(100, 200, 300)) == 2 * 200**3 / 4.0


def test_matmul_peak_refuses_other_dtypes():
    with pytest.raises(ValueError, match="'int8'; allowed: float32, bfloat16, float64"):
        machine.matmul_peak("int8")


def test_description_is_one_line_without_the_host():
    line = machine.describe()
    assert "\n" not in line
    assert f"jax {jax.__version__}" in line
    assert line.endswith(f"{jax.device_count()} cpu devices")
    assert platform.node() not in line.replace(",", " ").split()


@pytest.mark.parametrize(("number", "words"), [(1, "1 core"), (2, "2 cores")])
def test_one_of_a_kind_is_singular(number, words):
    assert machine._counted(number, "core") == words


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident size from /proc")
def test_peak_memory_grows_with_use_and_stays():
    slack = 2**24  # the kernel counts pages in batches per thread, so its sums are off by a little
    before = machine.peak_memory()
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    block = np.ones(before - resident + 2**26, np.uint8)  # 64 MiB above the peak so far
    grown = machine.peak_memory()
    assert abs(grown - before - 2**26) < slack
    del block
    assert machine.peak_memory() > grown - slack
