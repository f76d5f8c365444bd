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
from collections.abc import Sequence
from dataclasses import dataclass, field

from contenders.contest_options import tell_figures
from contenders.own_step import StepOptions, own_step
from contenders.side_by_side import Contender, check_interpreters, contest
from contenders.table import table

from dsv3_jax.cli import parse, run, user_errors
from dsv3_jax.config import MeshConfig
from dsv3_jax.config.mesh import AXES
from dsv3_jax.config.presets import bench_cpu


@dataclass(frozen=True)
class Options(StepOptions):
    """What is compared, and how long."""

    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(1, 1, 2, 4, bucket_factor=2.0))


def main(args: Sequence[str]) -> None:
    """Prints one table."""
    options = parse(Options, Options(), prog="mesh_cpu.py", description=__doc__, args=args)
    mesh = options.mesh
    with user_errors():
        check_interpreters(options.interpreters)
        mesh.check_model(bench_cpu())
        mesh.check_rows(options.rows, 1)
    name = " x ".join(f"{axis} {getattr(mesh, axis)}" for axis in AXES if getattr(mesh, axis) > 1)
    flags = f"--xla_force_host_platform_device_count={mesh.size}"
    on_mesh = [
        own_step(options, python, name or "mesh of one", flags, mesh=dataclasses.asdict(mesh))
        for python in options.pythons
    ]
    on_one = [[own_step(options, python, "one device")] for python in options.pythons]
    report(contest(on_mesh, on_one, qualify=options.qualify, rounds=options.rounds), options)


def report(ran: Sequence[Contender], options: Options) -> None:
    """Prints the table, and keeps the figures if asked to."""
    tell_figures(options, ran, options.sizes, table(ran, ("one device",)))


if __name__ == "__main__":
    run(main)
