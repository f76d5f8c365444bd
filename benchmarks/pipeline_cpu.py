"""A step over pipeline ranks against plain accumulation of the same micro-batches on the same
devices, side by side in one process.

    python benchmarks/pipeline_cpu.py [--schedules dualpipe 1f1b ...] [--parts]

Eight emulated devices: pipe 4 x local 2, and for plain accumulation data 4 x local 2, whose experts
lie on two devices as well (or, with --plain, local 8). A step is eight micro-batches of eight rows:
a device has four rows of a micro-batch in the pipeline, one without. The model is `tiny` with four
layers and MTP, activations are bfloat16; buckets of twice an even share hold all copies, so that no
overflow rounds are measured.

The devices share the cores, so idle devices cost nothing here: this is what the pipeline's programs
and its executor cost, not its bubble. All programs are compiled first, then the contenders take
turns, and medians count. --parts tells what a step is made of: the seconds until its parts are
handed over, and until they are done; and what operations of a kind take when each is waited for.

Expected: the pipeline at 1.3 times plain accumulation's seconds; the aim is 1.5, the floor 2.5. Ten
minutes on two cores, most of it compilation, which a cache keeps.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from contenders.table import quartiles

from dsv3_jax.cli import parse, run, user_errors
from dsv3_jax.config import MeshConfig, PipelineConfig, RunConfig
from dsv3_jax.config.fields import check
from dsv3_jax.config.pipeline import ScheduleName
from dsv3_jax.config.presets import tiny_run
from dsv3_jax.parallel.schedules import make
from dsv3_jax.process import emulate, prepare

if TYPE_CHECKING:
    from contenders.pipeline_step import PipelineStep

BY_PIPE = MeshConfig(pipe=4, local=2, bucket_factor=2.0)
PLAIN = {
    "data 4 x local 2": MeshConfig(data=4, local=2, bucket_factor=2.0),
    "local 8": MeshConfig(local=8, bucket_factor=2.0),
}
LAYERS = 4
STAGES = "E+2|1|1+H|M"  # 2, 1, 1.9, 1.9 in layers: the head is 0.9 of one, and MTP has both


@dataclass(frozen=True)
class Options:
    """What is compared, and how often."""

    schedules: tuple[ScheduleName, ...] = ("dualpipe",)
    """Of the pipeline"""
    plain: tuple[str, ...] = ("data 4 x local 2",)
    """Meshes of plain accumulation"""
    microbatches: int = 8
    """Of a step"""
    rows: int = 8
    """Of a micro-batch, all devices together"""
    length: int = 128
    """Tokens of a row"""
    rounds: int = 5
    """Alternating ones, after one that compiles and one that warms up"""
    parts: bool = False
    """Also tell what a pipeline's step is made of, in part by waiting for every operation"""

    def __post_init__(self) -> None:
        check("--rounds", self.rounds, self.rounds >= 1, "at least 1")
        others = "schedules with as many stages as ranks"
        for name in self.schedules:
            check("--schedules", name, name != "dualpipev", others)
        for name in self.plain:
            check("--plain", name, name in PLAIN, "; ".join(PLAIN))

    @property
    def run(self) -> RunConfig:
        """All but the mesh."""
        tiny = tiny_run()
        rows = self.rows * self.microbatches
        return replace(
            tiny,
            model=replace(tiny.model, num_layers=LAYERS),
            data=replace(tiny.data, length=self.length),
            train=replace(tiny.train, rows=rows, microbatches=self.microbatches),
        )


@dataclass
class Contender:
    """A step, and the seconds it took."""

    name: str
    step: Callable[[], Any] = field(repr=False)
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def main(args: Sequence[str]) -> None:
    """Prints a table of contenders, and one for each pipeline of what it is made of."""
    prepare()
    options = parse(Options, Options(), prog="pipeline_cpu.py", description=__doc__, args=args)
    with user_errors():
        for mesh in (BY_PIPE, *PLAIN.values()):
            mesh.check_rows(options.rows * options.microbatches, options.microbatches)
        for name in options.schedules:
            make(name, BY_PIPE.pipe, options.microbatches)
        emulate(BY_PIPE.size)
    from contenders.dsv3_step import step_of
    from contenders.pipeline_step import PipelineStep

    from dsv3_jax.train.machine import describe

    plain = [
        Contender(f"plain, {name}", step_of(replace(options.run, mesh=PLAIN[name])))
        for name in options.plain
    ]
    pipelines = [
        Contender(f"{name}, pipe 4 x local 2", PipelineStep(with_pipeline(options.run, name)))
        for name in options.schedules
    ]
    take_turns([*plain, *pipelines], options.rounds)
    print(f"{describe()}; bfloat16, {options.microbatches} x {options.rows} x {options.length}")
    report(plain, pipelines)
    for contender in pipelines if options.parts else ():
        tell_parts(contender, options.rounds)


def with_pipeline(cfg: RunConfig, schedule: ScheduleName) -> RunConfig:
    return replace(cfg, mesh=BY_PIPE, pipeline=PipelineConfig(schedule, STAGES))


def take_turns(contenders: Sequence[Contender], rounds: int) -> None:
    """Every contender once in every round; each round begins with another one."""
    for contender in contenders:
        contender.step()
        contender.step()
    for i in range(rounds):
        for k in range(len(contenders)):
            contender = contenders[(i + k) % len(contenders)]
            begun = time.perf_counter()
            contender.step()
            contender.seconds.append(time.perf_counter() - begun)


def report(plain: Sequence[Contender], pipelines: Sequence[Contender]) -> None:
    """Medians, quartiles, ratios to every plain contender."""
    titles = [f"x {contender.name}" for contender in plain]
    print(f"\n| contender | seconds | quartiles | {' | '.join(titles)} |")
    print(f"| --- | ---: | --- | {' | '.join('---:' for _ in titles)} |")
    for contender in (*plain, *pipelines):
        low, high = quartiles(contender.seconds)
        ratios = [f"{contender.median / other.median:.2f}" for other in plain]
        print(
            f"| {contender.name} | {contender.median:.3f} | {low:.3f} to {high:.3f} "
            f"| {' | '.join(ratios)} |"
        )


def tell_parts(contender: Contender, rounds: int) -> None:
    """What a step is made of."""
    step: PipelineStep = contender.step
    parts = [step.parts() for _ in range(rounds)]
    print(f"\n{contender.name}\n\n| part | handed over, seconds | done |\n| --- | ---: | ---: |")
    for name in parts[0]:
        handed, done = (statistics.median(p[name][i] for p in parts) for i in range(2))
        print(f"| {name} | {handed:.3f} | {done:.3f} |")
    taken = [step.operations() for _ in range(rounds)]
    print("\n| operations, each waited for | number | seconds of all |\n| --- | ---: | ---: |")
    for kind, found in taken[0].items():
        seconds = statistics.median(sum(t[kind]) for t in taken)
        print(f"| {kind} | {len(found)} | {seconds:.3f} |")


if __name__ == "__main__":
    run(main)
