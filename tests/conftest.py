"""The strict test room: eight emulated CPU devices, no silent broadcasting, no silent casts.

JAX reads the platform when it is first imported and the number of devices when it first uses
them; both are therefore settled before any test module is collected.
"""

import gc
import os
import signal
from collections.abc import Iterator

import pytest

NUM_CPU_DEVICES = 8  # divides into meshes of 1, 2, 4 and 8, with 2 or 4 nodes

# The files that take longest start first, however few their tests: one that starts last leaves the
# other worker without work, a minute and more in the slow tier.
LONGEST = (
    "train/test_pipeline_step.py",
    "train/test_quantized_weights.py",
    "train/test_sharded_step.py",
    "train/test_trouble_runs.py",
    "train/test_mesh_runs.py",
    "train/test_pipeline_runs.py",
    "train/test_kills.py",
    "train/test_process_runs.py",
    "plan/test_compile.py",
    "parallel/test_dispatch.py",
    "quant/test_fp8_gemm.py",
    "train/test_loop.py",
    "train/test_step.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Settle JAX's platform, devices and strictness for the whole process."""
    if config.getoption("markexpr") != "gpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = ""  # commands started by a test keep no programs
    # A process born in a script's background ignores ^C, and so would all that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Modules, tests and traces are millions of objects that stay: looking for garbage at every 700
    # new ones took a sixteenth of the tier.
    gc.set_threshold(20_000, 10, 10)
    import jax

    # A configuration value, not XLA_FLAGS: commands started by a test see one device, as users do.
    jax.config.update("jax_num_cpu_devices", NUM_CPU_DEVICES)
    jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the others stay in order."""
    files = {name: place for place, name in enumerate(LONGEST)}

    def place(item: pytest.Item) -> int:
        return files.get("/".join(item.path.parts[-2:]), len(files))

    items.sort(key=place)


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 for one test: parallel and plain programs are proved equal there."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture
def strict_dtypes() -> Iterator[None]:
    """No implicit promotion between dtypes for one test; optax is not written for it."""
    import jax

    with jax.numpy_dtype_promotion("strict"):
        yield
