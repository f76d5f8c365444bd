"""The options of `python -m dsv3_jax.plan`, and which of them go together."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dsv3_jax.config import RunConfig
from dsv3_jax.config.mesh import MAX_DEVICES
from dsv3_jax.config.presets import tiny_run
from dsv3_jax.parallel.orders import TWO_CHUNKS
from dsv3_jax.plan.hardware import WhatIf
from dsv3_jax.plan.serving import ServingLayout

Flag = tyro.conf.arg
Switch = tyro.conf.FlagCreatePairsOff
DEFAULT_TOP = 10


@dataclass(frozen=True)
class PlanOptions:
    """Of a run; the sections further down are its configuration."""

    config: Path | None = None
    """Python file with `def config() -> RunConfig`; options below override what it returns"""
    hardware: str = "h800"
    """h800, h100, h200, or cpu, measured here and shared by the devices of mesh"""
    overlap: bool = True
    """Hide the exchange of one micro-batch behind the computation of another, where a schedule
    pairs them"""
    price: float | None = None
    """US dollars per device-hour; default: the report's 2 for h800, for others none is known"""
    json: Annotated[bool, Switch] = False
    """Print JSON alone"""
    serve: Annotated[bool, Switch] = False
    """Plan serving the model instead of training it"""
    compile: Annotated[bool, Switch] = False
    """Also compile the run's programs from shapes alone, for all devices of mesh, and hold what
    they take against the plan: minutes"""
    skew: float = 1.0
    """Token copies at the fullest device over an even share, which says how many rounds an
    exchange takes"""
    memory_bars: Path | None = None
    """Picture of every rank's memory to write: .png, .svg or .pdf"""
    search: Annotated[bool, Switch] = False
    """Find the meshes and schedules that fit, fastest first, instead of planning the run's own"""
    devices: int | None = None
    """With --search: how many; default: as many as mesh has"""
    top: int | None = None
    """With --search: layouts to show; default: 10"""
    timeline: Path | None = None
    """Picture of the step to write: .png, .svg or .pdf"""
    what_if: WhatIf = field(default_factory=WhatIf)
    serving: ServingLayout = field(default_factory=ServingLayout)
    run: Annotated[RunConfig, Flag(name="")] = field(default_factory=tiny_run)


@dataclass(frozen=True)
class Options:
    """Of a pipeline schedule alone."""

    schedule: Literal["gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev"]
    """Which one"""
    ranks: int = 8
    """Devices, or groups of them, that the model's stages lie on"""
    microbatches: int = 20
    """Of one step, altogether"""
    timeline: Path | None = None
    """Picture to write: .png, .svg or .pdf"""
    forward: Annotated[float, Flag(name="F")] = 1.0
    """Time of a forward pass"""
    backward: Annotated[float, Flag(name="B")] = 2.0
    """Time of a whole backward pass; b, its input gradients alone, takes B - W"""
    weights: Annotated[float | None, Flag(name="W")] = None
    """Time of the weight gradients, a part of B; default: half of it"""
    fused: Annotated[float | None, Flag(name="FB")] = None
    """Time of a forward and a backward pass in one program; below F + B, the default, where
    communication hides behind computation"""
    transfer: float | None = None
    """Time in which two neighbours stop to swap messages; default: these cross in no time, and only
    who needs one waits"""

    @property
    def times(self) -> tuple[float, float, float, float]:
        """F, B, W, FB."""
        forward, backward = self.forward, self.backward
        weights = backward / 2 if self.weights is None else self.weights
        return forward, backward, weights, forward + backward if self.fused is None else self.fused


def check_times(options: Options) -> None:
    """ValueError for parts that are longer than the whole, of a schedule's times."""
    forward, backward, weights, pair = options.times
    longest = max(forward, backward)
    if options.schedule in TWO_CHUNKS and not pair >= longest:
        raise ValueError(
            f"--FB is {pair:g}; allowed: at least {longest:g}, the longer one of --F and "
            "--B, which both run in it"
        )
    if not weights <= backward:
        raise ValueError(
            f"--W is {weights:g}; allowed: at most --B, {backward:g}, of which it is a part"
        )


def check(options: PlanOptions) -> None:
    """ValueError for options that go not together, and for pictures that cannot be."""
    from dsv3_jax.drawing import check_picture_path

    pictures = {"--memory-bars": options.memory_bars, "--timeline": options.timeline}
    for option, path in pictures.items():
        if path:
            check_picture_path(path, option)
    every = {"--search": options.search, "--compile": options.compile} | pictures
    given = [name for name, value in (every | {"--serve": options.serve}).items() if value]
    for alone in {"--search", "--serve"}.intersection(given):
        if len(given) > 1:
            other = next(name for name in given if name != alone)
            first, second = sorted((alone, other), key=given.index)
            raise ValueError(f"{first} and {second}; allowed: one of them")
    if options.memory_bars and options.timeline:
        _check_apart(options.memory_bars, options.timeline)
    if not 1 <= options.skew < float("inf"):
        raise ValueError(f"--skew is {options.skew:g}; allowed: 1 or more, finite")
    for alone, given in (("--serve", options.serve), ("--search", options.search)):
        if given and options.skew != 1:
            raise ValueError(f"--skew and {alone}; allowed: one of them")
        if given and options.what_if.about_promotion:  # whose answer is of a run's own step
            asked = options.what_if.about_promotion
            raise ValueError(f"{asked} and {alone}; allowed: one of them")
    if not options.search:
        for name, value in (("--devices", options.devices), ("--top", options.top)):
            if value is not None:
                raise ValueError(f"{name} is {value} without --search; allowed: both, or neither")
    elif options.devices is not None and not 1 <= options.devices <= MAX_DEVICES:
        raise ValueError(f"--devices is {options.devices}; allowed: 1 to {MAX_DEVICES:,}")


def _check_apart(memory_bars: Path, timeline: Path) -> None:
    if memory_bars.resolve() == timeline.resolve():
        raise ValueError(
            f"--memory-bars and --timeline are both {timeline}; allowed: a file for each"
        )
