"""What the commands that train share: their options, whose configuration is the default, and a run
from there to its exit code.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import tyro

from dsv3_jax import process
from dsv3_jax.cli import parse, user_errors, value_of
from dsv3_jax.config import RunConfig
from dsv3_jax.config.load import load_config, load_json
from dsv3_jax.config.presets import tiny_run
from dsv3_jax.parallel import launch
from dsv3_jax.parallel.launch import LaunchOptions
from dsv3_jax.train.folder import RunFolder, find_run, locked, run_at

if TYPE_CHECKING:
    from dsv3_jax.train.kind import Kind


@dataclass(frozen=True)
class Options:
    """A command's own options; the sections below are the run's configuration."""

    config: Path | None = None
    """Python file with `def config() -> RunConfig`; options below override what it returns"""
    resume: str | None = None
    """Continue a run (folder or name; without a value the newest), by default with its config"""
    init_from: str | None = None
    """Start a new run from another's weights (folder or name; or a Hugging Face folder), by default
    with its config"""
    init_moments: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """With --init-from of a run: its optimiser's moments too, for a next phase of its training"""
    print_config: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the resolved configuration as JSON and leave"""
    print_schedule: Path | None = None
    """Draw learning rate, batch, bias speed and MTP weight as a .png, .svg or .pdf and leave"""
    devices: int | None = None
    """Emulate this many devices on the CPU, whose cores they share; the axes of mesh multiply to it
    (XLA_FLAGS does as well)"""
    debug_nans: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Say in which layer a loss or gradient stops being finite; slower"""
    profile: str | None = None
    """START:STOP, steps to trace into the run's folder, for xprof and Perfetto"""
    launch: LaunchOptions = field(default_factory=LaunchOptions)
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=tiny_run)


class Command(NamedTuple):
    """One of them."""

    options: Options
    """The defaults, with the default configuration"""
    prog: str
    description: str
    of_weights: Callable[[RunConfig], RunConfig] = lambda cfg: cfg
    """The default configuration of a run from the weights of one that had this"""

    def parse(self, args: Sequence[str], default: RunConfig) -> Options:
        """SystemExit: 0 after --help, 2 for a mistake."""
        return parse(
            type(self.options),
            replace(self.options, run=default),
            prog=self.prog,
            description=self.description,
            args=args,
        )


def resolve(
    command: Command, args: Sequence[str]
) -> tuple[Options, RunFolder | None, RunFolder | None]:
    """Options over the config file's, the resumed run's or the default configuration; the folder to
    resume and the one whose weights to start from. ValueError for what cannot be.
    """
    args = _with_resume_value(list(args))
    default = command.options.run
    path = value_of(args, "--config")
    if path is not None:
        default = load_config(Path(path))
    resumed, weights = value_of(args, "--resume"), value_of(args, "--init-from")
    if weights is None and "--init-moments" in args:
        raise ValueError("--init-moments: moments of what? allowed: with --init-from a run")
    if not {"-h", "--help"}.isdisjoint(args) or (resumed is None and weights is None):
        return command.parse(args, default), None, None
    if resumed is not None and weights is not None:
        raise ValueError("--resume and --init-from: one run cannot be both; allowed: one of them")
    parent = Path(value_of(args, "--output.folder") or default.output.folder)
    if weights is not None:
        folder = run_at(parent, weights, "--init-from")
    else:
        folder = find_run(parent, resumed)
    if path is None:
        default = load_json(folder.config)
        if weights is not None:
            default = command.of_weights(default)
    options = command.parse(args, default)
    return (options, None, folder) if resumed is None else (options, folder, None)


def _with_resume_value(args: list[str]) -> list[str]:
    """`--resume` alone means the newest run."""
    for place, arg in enumerate(args):
        if arg == "--resume" and (place + 1 == len(args) or args[place + 1].startswith("-")):
            return [*args[: place + 1], "newest", *args[place + 1 :]]
    return args


def perform(
    options: Options,
    resume: RunFolder | None,
    init_from: RunFolder | None,
    epochs: int | None = None,
    make_kind: Callable[[], "Kind"] | None = None,
) -> int | None:
    """Prints what is asked for, or trains. Returns the exit code; SystemExit 2 for the user's
    mistakes.
    """
    if options.print_config:
        from dsv3_jax.plan.cuts import check_pipeline

        with user_errors():
            check_pipeline(options.run)
        print(options.run.to_json())
        return 0
    if options.print_schedule:
        from dsv3_jax.train.schedule_picture import draw_schedules, summary

        with user_errors():
            draw_schedules(options.run, options.print_schedule)
        for line in summary(options.run):
            print(line)
        print(options.print_schedule)
        return 0
    with user_errors():
        launch.check(options.launch, options.devices, options.run.mesh.size)
        started = launch.started()
        if options.launch.processes > 1 and not started:
            return launch.run(options.launch)
    if not started and not options.launch.cluster:
        return _train(options, resume, init_from, epochs, make_kind)
    with launch.leaving_at_once():
        return _train(options, resume, init_from, epochs, make_kind, started)


def _train(
    options: Options,
    resume: RunFolder | None,
    init_from: RunFolder | None,
    epochs: int | None,
    make_kind: Callable[[], "Kind"] | None,
    started: launch.Started | None = None,
) -> int:
    devices = options.devices
    if started:
        devices = options.run.mesh.size // started.count
    with user_errors():
        process.emulate(devices)
        if started or options.launch.cluster:
            from dsv3_jax.parallel import processes

            processes.join(started and started.place)
        process.check_devices()
    # JAX comes in here, not before --help.
    from dsv3_jax.checkpoint.arrays import CheckpointError
    from dsv3_jax.parallel.processes import is_first
    from dsv3_jax.train.console import RunConsole
    from dsv3_jax.train.profile import parse_steps
    from dsv3_jax.train.run import Watch, execute, prepare

    console = RunConsole(quiet=not is_first())
    idle = (options.devices or 0) - options.run.mesh.size
    if idle > 0:
        console.print(f"warning    {idle} of {options.devices} devices are idle: see --mesh")
    with contextlib.ExitStack() as locks:
        with user_errors():
            profiled = options.profile and parse_steps(options.profile)
            watch = Watch(options.debug_nans, profiled, options.launch.hang_seconds)
            if resume and is_first():
                locks.enter_context(locked(resume))
            say = partial(console.print, soft_wrap=True)
            more = {"moments": options.init_moments, "epochs": epochs}
            more["kind"] = make_kind and make_kind()
            prepared = prepare(options.run, resume, say, init_from, watch, **more)
            if not resume and is_first():
                locks.enter_context(locked(prepared.run))
            if started and is_first():
                started.tell_run(prepared.run.path)
        with user_errors((CheckpointError, OSError, MemoryError)):  # others are faults of ours
            return execute(prepared, console, watch)
