"""`python -m dsv3_jax.plan`: what a run takes and costs before it runs (report 3.2, 3.5, Table 1),
what serving a model does (3.4), and what a pipeline schedule alone does (Table 2).
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import tyro

from dsv3_jax.cli import fail, parse, run, to_stderr, user_errors, value_of
from dsv3_jax.config.load import load_config
from dsv3_jax.plan.hardware import Hardware
from dsv3_jax.plan.options import DEFAULT_TOP, Options, PlanOptions, check, check_times
from dsv3_jax.process import check_devices, emulate

if TYPE_CHECKING:
    from rich.table import Table

    from dsv3_jax.plan.compiled import CompiledPlan

PROG = "python -m dsv3_jax.plan"
DESCRIPTION = """Plan a run before paying for it: memory, step time, bubble, MFU, hours, money.

With --config: a training run on the described hardware, derived line by line; with --compile as
well, its programs compiled for all devices, emulated; with --search, on which meshes and schedules
it fits and which are fastest; with --serve, what serving its model comes to. With --schedule: idle
time and live activations of a pipeline schedule, simulated beside the report's formulas. No device
is needed.
"""
SCHEDULE_ABOUT = """What a pipeline schedule costs: idle time and live activations of every rank.

Simulated beside the report's formulas, and drawn with --timeline. Times are in any unit, of one
micro-batch in one of a rank's model parts.
"""


def main(args: Sequence[str]) -> int | None:
    """The command. SystemExit 2 for the user's mistakes."""
    sys.stdout.reconfigure(errors="replace")  # × and µ are in no terminal's ASCII
    args, schedule = list(args), Options(schedule=tyro.MISSING)
    if any(arg.partition("=")[0] == "--schedule" for arg in args):
        options = parse(Options, schedule, prog=PROG, description=SCHEDULE_ABOUT, args=args)
        with user_errors():
            show(options)
        return None
    if not {"-h", "--help"}.isdisjoint(args):
        show_help(schedule)
    path = value_of(args, "--config")
    if path is None:
        fail(
            "nothing to plan; allowed: --config FILE for a run, --schedule NAME for a schedule",
            hint=f"{PROG} --help lists all options",
        )
    if not path:
        fail("--config is ''; allowed: a Python file with config()")
    with user_errors():
        default = PlanOptions(run=load_config(Path(path)))
        show_plan(parse(PlanOptions, default, prog=PROG, description=DESCRIPTION, args=args))


def show_help(schedule: Options) -> NoReturn:
    """Of both kinds of plan, one below the other."""
    for default, about in ((PlanOptions(), DESCRIPTION), (schedule, SCHEDULE_ABOUT)):
        try:
            parse(type(default), default, prog=PROG, description=about, args=["--help"])
        except SystemExit as ended:
            if ended.code:
                raise
    raise SystemExit(0)


def show_plan(options: PlanOptions) -> None:
    """Prints the plan, and draws the step. ValueError or OSError, one line, for bad input."""
    check(options)
    devices = options.devices if options.devices is not None else options.run.mesh.size
    if options.compile:
        emulate(devices)  # before JAX has begun
    hardware = _hardware(options.hardware, devices)
    if options.search:
        _show_search(options, hardware, devices)
        return
    if options.serve:
        _show_serving(options, hardware)
        return
    from dsv3_jax.plan.cells import print_json
    from dsv3_jax.plan.compiled_tables import compiled_json, compiled_line, compiled_tables
    from dsv3_jax.plan.memory import memory_of
    from dsv3_jax.plan.memory_tables import draw_memory, memory_json, memory_lines, memory_table
    from dsv3_jax.plan.prediction import predict
    from dsv3_jax.plan.tables import plan_json, plan_tables
    from dsv3_jax.plan.timeline import draw_timeline

    memory, capacity = memory_of(options.run), hardware.memory.value
    if options.memory_bars:
        draw_memory(memory, options.memory_bars, capacity)
    compiled = _compiled(options) if options.compile else None
    prediction = predict(
        options.run,
        hardware,
        what_if=options.what_if,
        overlap=options.overlap,
        price=options.price,
    )
    if options.timeline:
        draw_timeline(prediction.step.timeline, options.timeline, "seconds")
    if options.json:
        told = {"memory": memory_json(memory, capacity)} | plan_json(prediction)
        if compiled:
            told["compiled"] = compiled_json(compiled)
        print_json(told)
        return
    mesh = options.run.mesh
    sizes = f"pipe {mesh.pipe} × data {mesh.data} × node {mesh.node} × local {mesh.local}"
    parts = [memory_table(memory), *memory_lines(memory, capacity, options.skew)]
    if compiled:
        parts += [*compiled_tables(compiled, capacity), compiled_line(compiled)]
    parts += plan_tables(prediction)
    _print(f"{mesh.size:,} × {hardware.name}: {sizes}", parts, hardware)
    if prediction.price is None:
        print(f"no price of {hardware.name} is known: see --price")
    for picture in filter(None, (options.memory_bars, options.timeline)):
        print(f"picture: {picture}")


def _compiled(options: PlanOptions) -> "CompiledPlan":
    from dsv3_jax.plan.compile import compile_run

    check_devices()
    return compile_run(options.run, to_stderr)


def _show_search(options: PlanOptions, hardware: Hardware, devices: int) -> None:
    from dsv3_jax.plan.cells import print_json
    from dsv3_jax.plan.search import Ask, search
    from dsv3_jax.plan.search_tables import search_json, search_lines, search_table

    top = DEFAULT_TOP if options.top is None else options.top
    ask = Ask(hardware, devices, top, options.what_if, options.overlap, options.price)
    with _progress() as told:
        answer = search(options.run, ask, told)
    if options.json:
        print_json(search_json(answer))
        return
    tables = [search_table(answer)] if answer.fastest else []
    _print(f"{devices:,} × {hardware.name}", [*tables, *search_lines(answer)], hardware)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error, if that is a terminal; it goes when all is done."""
    from rich.console import Console
    from rich.progress import Progress

    console, tasks = Console(stderr=True), {}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:

        def told(doing: str, done: int, of: int) -> None:
            if doing not in tasks:
                tasks[doing] = progress.add_task(doing, total=of)
            progress.update(tasks[doing], completed=done)

        yield told


def _show_serving(options: PlanOptions, hardware: Hardware) -> None:
    from dsv3_jax.plan.cells import print_json
    from dsv3_jax.plan.hardware import changed
    from dsv3_jax.plan.prediction import price_of
    from dsv3_jax.plan.serving import Serving
    from dsv3_jax.plan.tables import serving_json, serving_tables

    serving = Serving(
        options.run.model,
        changed(hardware, options.what_if),
        options.serving,
        price_of(hardware, options.price),
        options.overlap,
        options.what_if.fused_cast,
    )
    if options.json:
        print_json(serving_json(serving))
        return
    units = f"units of {options.serving.prefill_devices} and {options.serving.decode_devices}"
    _print(f"serving on {hardware.name}: {units}", serving_tables(serving), hardware)
    if serving.price is None:
        print(f"no price of {hardware.name} is known: see --price")


def _hardware(name: str, devices: int) -> Hardware:
    from dsv3_jax.plan.hardware import hardware_named

    if name != "cpu":
        return hardware_named(name)
    from dsv3_jax.plan.cpu_probe import measured_cpu

    return measured_cpu(devices)


def _print(title: str, parts: Sequence["Table | str"], hardware: Hardware) -> None:
    from dsv3_jax.plan.cells import print_parts
    from dsv3_jax.plan.layer_time import NOT_COUNTED
    from dsv3_jax.train.console import RunConsole

    assumed = (f"assumed: {line}" for line in hardware.assumed)
    print_parts(RunConsole(), (title, "", *parts, *assumed, f"not counted: {NOT_COUNTED}"))


def show(options: Options) -> None:
    """Prints the tables, and draws the picture. ValueError or OSError, one line, for bad input."""
    from dsv3_jax.drawing import check_picture_path
    from dsv3_jax.parallel.schedules import make, simulate
    from dsv3_jax.plan.bubbles import FORMULAS
    from dsv3_jax.plan.cells import print_parts
    from dsv3_jax.plan.moments import LARGEST
    from dsv3_jax.plan.schedule_tables import rank_table, whole_table
    from dsv3_jax.plan.timeline import OPTION, draw_timeline, title
    from dsv3_jax.train.console import RunConsole

    if options.timeline:
        check_picture_path(options.timeline, OPTION)
    if options.ranks * options.microbatches > LARGEST:
        raise ValueError(
            f"--ranks {options.ranks:,} times --microbatches {options.microbatches:,} is too large "
            f"to simulate; allowed: up to {LARGEST:,}"
        )
    schedule = make(options.schedule, options.ranks, options.microbatches)
    timeline = simulate(schedule, *options.times, transfer=options.transfer)
    check_times(options)
    if options.timeline:
        draw_timeline(timeline, options.timeline)
    parts = [title(timeline), whole_table(timeline, options)]
    if holds := FORMULAS[options.schedule].holds:
        parts.append(f"the bubble's formula holds for {holds}")
    parts.append(rank_table(timeline))
    if options.timeline:
        parts.append(f"picture: {options.timeline}")
    print_parts(RunConsole(), parts)


if __name__ == "__main__":
    run(main)
