"""A training step on a mesh of emulated devices against the same step on one, side by side.

    python benchmarks/mesh_cpu.py [--python PATH ...] [--mesh.node 2 --mesh.local 4]

The devices share the cores, so this is what the exchange of tokens and the gathering of weights
cost, not what a mesh gains. The step is that of train_cpu.py: `bench_cpu`, 8 rows of 512 random
tokens, float32; on two nodes of four devices each device has one row, and in buckets of twice an
even share the exchange mostly takes one round.

Expected: a table with a row for each interpreter; the mesh at 0.5 of one device's speed (twice the
time), at least at 0.33. 5 minutes on two cores.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import tyro
from contenders.contest_options import ContestOptions, tell_figures
from contenders.side_by_side import Contender, check_interpreters, contest, environment
from contenders.table import table

from dsv3_jax.cli import parse, run, user_errors
from dsv3_jax.config import MeshConfig
from dsv3_jax.config.mesh import AXES
from dsv3_jax.config.presets import bench_cpu

ONE = MeshConfig()


@dataclass(frozen=True)
class Options(ContestOptions):
    """What is compared, and how long."""

    torch_python: tyro.conf.Suppress[str | None] = None
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(1, 1, 2, 4, bucket_factor=2.0))
    rows: int = 8
    """Rows of a step"""
    length: int = 512
    """Tokens of a row"""


def main(args: Sequence[str]) -> None:
    """Prints one table."""
    options = parse(Options, Options(), prog="mesh_cpu.py", description=__doc__, args=args)
    with user_errors():
        check_interpreters(options.interpreters)
        options.mesh.check_model(bench_cpu())
        options.mesh.check_rows(options.rows, 1)
    pythons = (sys.executable, *options.python)
    on_mesh = [_contender(options, python, options.mesh) for python in pythons]
    on_one = [[_contender(options, python, ONE)] for python in pythons]
    report(contest(on_mesh, on_one, qualify=options.qualify, rounds=options.rounds), options)


def _contender(options: Options, python: str, mesh: MeshConfig) -> Contender:
    axes = [f"{axis} {getattr(mesh, axis)}" for axis in AXES if getattr(mesh, axis) > 1]
    flags = f"--xla_force_host_platform_device_count={mesh.size}"
    return Contender(
        name=" x ".join(axes) or "one device",
        group=f"interpreter {(sys.executable, *options.python).index(python) + 1}",
        python=python,
        script="train_dsv3.py",
        options={
            "rows": options.rows,
            "length": options.length,
            "warm_up": options.warm_up,
            "model": dataclasses.asdict(bench_cpu()),
            "dtype": "float32",
            "remat": "none",
            "recipe": "f32",
            "mesh": dataclasses.asdict(mesh),
        },
        tokens=options.rows * options.length,
        environment=environment(options.allocator) | {"XLA_FLAGS": flags},
    )


def report(ran: Sequence[Contender], options: Options) -> None:
    """Prints the table, and keeps the figures if asked to."""
    sizes = f"{options.rows} rows of {options.length} tokens"
    tell_figures(options, ran, sizes, table(ran, ("one device",)))


if __name__ == "__main__":
    run(main)
