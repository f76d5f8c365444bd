"""What compiled programs say beside the plan, as tables and as JSON."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dsv3_jax.plan.cells import GB, gigabytes, new_table
from dsv3_jax.plan.compiled import CompiledPlan

if TYPE_CHECKING:
    from rich.table import Table


def compiled_tables(compiled: CompiledPlan, capacity: float) -> Iterator["Table"]:
    """Ranks, micro-batches, programs."""
    columns = ("rank", "weights", "state", "gradients", "live", "sum", "planned", "off")
    left = f"left of {capacity / GB:g} GB"
    table = new_table("compiled: GB of a device, XLA:CPU's temporary apart", *columns, left)
    for rank in compiled.ranks:
        sizes = rank.weights, rank.state, rank.gradients, rank.live, rank.total
        planned = rank.planned.total
        cells = [str(rank.planned.rank), *map(gigabytes, sizes), gigabytes(planned)]
        table.add_row(*cells, _off(rank.total, planned), gigabytes(capacity - rank.total))
    yield table
    columns = ("stage", "F to b", "planned", "off", "b to W", "planned", "off")
    table = new_table("compiled: a micro-batch's MB", *columns, words={"stage"})
    for stage, residuals in compiled.residuals.items():
        cells = []
        for found, planned in (residuals, compiled.tapes[stage]):
            cells += [f"{found / 1e6:,.3f}", f"{planned / 1e6:,.3f}", _off(found, planned)]
        table.add_row(stage, *cells)
    yield table
    yield _program_table(compiled)


def _program_table(compiled: CompiledPlan) -> "Table":
    columns = ("program", "stages", "s", "takes", "gives", "temporary", "TFLOPs", "collectives")
    title = "compiled: programs, GB of a device"
    table = new_table(title, *columns, words={"program", "stages", "collectives"})
    for program in compiled.programs:
        sizes = program.arguments, program.results, program.temporary
        counted = ", ".join(f"{count} {name}" for name, count in program.collectives.items())
        cells = [program.name, program.stages, f"{program.seconds:.0f}", *map(gigabytes, sizes)]
        table.add_row(*cells, f"{program.flops / 1e12:,.3g}", counted)
    return table


def compiled_line(compiled: CompiledPlan) -> str:
    """What it took."""
    if compiled.plan.cfg.mesh.pipe == 1:
        (program,) = compiled.programs
        return (
            f"a step without a pipeline is one program, compiled in {compiled.seconds:.0f} s: "
            "weights, gradients and live are read where it is traced, and lie in its "
            f"{gigabytes(program.temporary)} GB of temporary memory; this process held "
            f"{compiled.peak_bytes / GB:.1f} GB at most"
        )
    return (
        f"{len(compiled.programs)} programs compiled in {compiled.seconds / 60:.1f} minutes; this "
        f"process held {compiled.peak_bytes / GB:.1f} GB at most"
    )


def compiled_json(compiled: CompiledPlan) -> dict[str, Any]:
    """The same in bytes and seconds."""
    sizes = "weights", "state", "gradients", "live", "total"
    return {
        "seconds": compiled.seconds,
        "peak_bytes": compiled.peak_bytes,
        "ranks": [
            {name: getattr(rank, name) for name in sizes} | {"planned": rank.planned.total}
            for rank in compiled.ranks
        ],
        "residuals": _pairs(compiled.residuals),
        "tapes": _pairs(compiled.tapes),
        "programs": [asdict(program) for program in compiled.programs],
    }


def _pairs(sizes: Any) -> dict[str, dict[str, int]]:
    return {
        stage: dict(zip(("compiled", "planned"), pair, strict=True))
        for stage, pair in sizes.items()
    }


def _off(found: float, planned: float) -> str:
    return f"{planned / found - 1:+.1%}" if found else ""
