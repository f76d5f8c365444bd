"""One small training run for all tests of the command: its text, its configuration, and a way to
start it in this process that compiles little and each program only once.
"""

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from matplotlib.figure import Figure

from dsv3_jax.checkpoint import store
from dsv3_jax.config import (
    DataConfig,
    OutputConfig,
    Phase,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from dsv3_jax.model.router import RouterBias
from dsv3_jax.train import loop, pipeline_run, programs, quant_health, run, step, validation
from dsv3_jax.train.__main__ import main
from dsv3_jax.train.loop import Trainer
from dsv3_jax.train.metrics import read_metrics
from dsv3_jax.train.optimizer import adamw
from dsv3_jax.train.pipeline import Pipeline
from dsv3_jax.train.pipeline_state import from_whole
from dsv3_jax.train.sharding import ONE_DEVICE, RunSharding
from dsv3_jax.train.step import TrainState
from dsv3_jax.train.trouble import SpikeMeter
from tests.shapes import FAST_COMPILATION, random_model, tiny_model

# What no two runs have in common.
TIMES = {"seconds", "tokens_per_second", "matmul_share", "data_wait", "peak_memory"}


@dataclass(frozen=True)
class SmallRun:
    """A run of 6 steps with 2 rows of 16 tokens; logs at 1, 2, 4, 6, validates after 3 and at the
    end, saves at 4 and at the end.
    """

    home: Path

    @property
    def cfg(self) -> RunConfig:
        """Constant learning rate, so that a run of 3 steps is the first half of one of 6."""
        return RunConfig(
            model=tiny_model(vocab_size=300, num_layers=2),
            data=DataConfig(
                source=str(self.home / "text" / "*.txt"), validation_fraction=0.2, length=16
            ),
            train=TrainConfig(steps=6, rows=2, dtype="float32"),
            schedule=ScheduleConfig(
                learning_rate=1e-2, warmup_steps=2, learning_rate_phases=(Phase(0, 10**6, 1e-2),)
            ),
            output=OutputConfig(
                folder=str(self.home / "runs"),
                name="small",
                log_every=2,
                eval_every=3,
                eval_rows=4,
                save_every=4,
                sample_tokens=8,
                sample_prompt="def ",
            ),
        )

    @property
    def config(self) -> Path:
        """The configuration as a user's file."""
        return self.home / "small.py"

    def make(self) -> None:
        """Writes text and configuration file."""
        (self.home / "text").mkdir()
        for part in range(4):
            lines = [f"def f{i}(x):\n    return x + {i * i % 97}\n\n" for i in range(30)]
            (self.home / "text" / f"{part}.txt").write_text(f"# part {part}\n" + "".join(lines))
        write_config(self.config, self.cfg)

    def train(self, *args: object, pictures: bool = False) -> int | None:
        """`python -m dsv3_jax.train ...` in this process. Returns the exit code."""
        with self.quick(pictures):
            return main(list(map(str, args)))

    @contextlib.contextmanager
    def quick(self, pictures: bool = False) -> Iterator[None]:
        """Compiles without optimising, and alike runs but once: these programs run a few times on
        small arrays. Draws no weights, measures no machine, leaves the user's cache alone.

        Figures are made, and only with `pictures` rendered too: that takes longer than all else of
        such a run. One run of each kind of page does.
        """
        with pytest.MonkeyPatch.context() as patch, jax_option("jax_disable_most_optimizations"):
            patch.setenv("XDG_CACHE_HOME", str(self.home / "cache"))
            if not pictures:
                patch.setattr(Figure, "savefig", save_nothing)
            patch.setattr(run, "matmul_peak", lambda dtype: 1e9)
            patch.setattr(programs, "init_state", random_state)
            patch.setattr(Pipeline, "init_state", random_stages)
            patch.setattr(quant_health, "UNOPTIMISED", FAST_COMPILATION)
            patch.setattr(pipeline_run, "Pipeline", partial(Pipeline, options=FAST_COMPILATION))
            patch.setattr(programs, "make_step", once_per_program(make_quick_step))
            patch.setattr(programs, "make_validate", once_per_program(validation.make_validate))
            patch.setattr(loop, "make_probe", once_per_program(quant_health.make_probe))
            yield


def save_nothing(_: Figure, target: io.TextIOBase | Path, **options: object) -> None:
    """In place of `Figure.savefig`: a picture with nothing in it."""
    if isinstance(target, Path):
        target.write_bytes(b"")
    else:
        target.write("<svg></svg>")


def train_environment(home: Path) -> dict[str, str]:
    """Of a process that compiles little and finds its programs again below `home`."""
    flags = " ".join(f"--{name}={value}".lower() for name, value in FAST_COMPILATION.items())
    return {
        "XLA_FLAGS": flags,
        "XDG_CACHE_HOME": str(home / "cache"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(home / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def train_process(home: Path, *args: object) -> subprocess.Popen:
    """`python -m dsv3_jax.train ...` on its own, in its `train_environment`."""
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "dsv3_jax.train", *map(str, args)],
        cwd=Path(__file__).parents[1],
        env=os.environ | train_environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def jax_option(name: str) -> Iterator[None]:
    """Switches on an option that is off."""
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, False)


def random_state(cfg: RunConfig, sharding: RunSharding = ONE_DEVICE) -> TrainState:
    """What `init_state` returns, with NumPy's numbers: no half minute for a compilation."""
    model = random_model(cfg.model, seed=cfg.train.seed)
    _, params, biases = nnx.split(model, nnx.Param, RouterBias)
    return spread(TrainState(params, biases, empty_moments(cfg, params)), sharding)


def empty_moments(cfg: RunConfig, params: nnx.State) -> Any:
    """What the optimiser begins with, zeros throughout, without a program for each shape."""
    shapes = jax.eval_shape(adamw(cfg.optimizer).init, params)
    return jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), shapes)


def spread(state: TrainState, sharding: RunSharding) -> TrainState:
    """A copy of a state on a run's devices, by way of NumPy: to cut up what lies on a device
    already, a program is compiled for every shape.
    """
    places = sharding.placements(sharding.state_specs(state))
    return jax.device_put(jax.tree.map(np.array, state), places)


def random_stages(pipeline: Pipeline) -> TrainState:
    """The same for a pipeline."""
    return from_whole(pipeline.layout, jax.tree.map(np.array, random_state(pipeline.cfg)))


def make_quick_step(*args: Any) -> SimpleNamespace:
    """What `make_step` returns, to be lowered and compiled, without optimisation."""
    made = step.make_step(*args)

    def lower(*args: Any) -> SimpleNamespace:
        return SimpleNamespace(compile=partial(made.lower(*args).compile, FAST_COMPILATION))

    return SimpleNamespace(lower=lower)


PROGRAMS: dict[tuple, Callable] = {}


def once_per_program(make: Callable) -> Callable:
    """`make(graphdef, cfg, ...)`, which compiles nothing anew for a run that differs from an
    earlier one only in number of steps, seed, schedule and output.
    """

    def known(
        graphdef: nnx.GraphDef, cfg: RunConfig, *others: np.ndarray | RunSharding
    ) -> Callable:
        train = replace(cfg.train, steps=1, seed=0, max_bad_steps=1, spike="off")
        parts = cfg.model, cfg.data, train, replace(cfg.optimizer, ema_decay=0), cfg.quant, cfg.mesh
        arrays = (other.tobytes() for other in others if isinstance(other, np.ndarray))
        key = (make.__name__, *parts, *arrays)
        if key not in PROGRAMS:
            PROGRAMS[key] = make(graphdef, cfg, *others)
        return PROGRAMS[key]

    return known


def write_config(path: Path, cfg: RunConfig) -> None:
    """A config file that returns `cfg`."""
    path.write_text(
        "import json\n"
        "from dsv3_jax.config.run import RunConfig, from_dict\n"
        "def config():\n"
        f"    return from_dict(RunConfig, json.loads({cfg.to_json()!r}))\n"
    )


def with_model(cfg: RunConfig, **changes: Any) -> RunConfig:
    return replace(cfg, model=replace(cfg.model, **changes))


def send_at_step(patch: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
    """This process gets a signal while it works on update `step` (2 or later)."""
    launch = Trainer._launch

    def hooked(self):
        if self.position.step == step - 1:
            os.kill(os.getpid(), number)
        return launch(self)

    patch.setattr(Trainer, "_launch", hooked)


def spike_at(patch: pytest.MonkeyPatch, steps: list[int]) -> None:
    """Each time the first of these steps comes it is a spike by decree, and struck off."""
    limit = SpikeMeter.limit

    def decreed(self, step: int) -> float:
        limit(self, step)
        if steps and step == steps[0]:
            steps.pop(0)
            return 0.0
        return np.inf

    patch.setattr(SpikeMeter, "limit", decreed)


def timeless(run: Path) -> list[dict[str, Any]]:
    """The entries of a run's metrics.jsonl without what a clock measured, and without resumes,
    behind which a pipeline's operations are measured anew.
    """
    entries = read_metrics(run / "metrics.jsonl")
    entries = [entry for entry in entries if entry.get("event") != "resumed"]
    entries = [entry for entry in entries if entry["kind"] != "pipeline"]
    return [{k: v for k, v in entry.items() if k not in TIMES} for entry in entries]


def assert_same_checkpoint(run: Path, other: Path, step: int) -> None:
    """Parameters, router biases and moments bit for bit, and where the runs stood."""
    one, two = (store.load(path / "checkpoints", step) for path in (run, other))
    assert {**one.meta, "seconds": 0} == {**two.meta, "seconds": 0}
    assert one.arrays.keys() == two.arrays.keys() >= {"params", "router_bias", "mu", "nu"}
    for group, named in one.arrays.items():
        assert named.keys() == two.arrays[group].keys()
        for name, array in named.items():
            twin = two.arrays[group][name]
            assert array.dtype == twin.dtype
            assert np.array_equal(array.view(np.uint8), twin.view(np.uint8)), f"{group}/{name}"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
