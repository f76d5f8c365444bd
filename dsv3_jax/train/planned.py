"""What a run's plan says beside the run: at its start, at its end, and when memory runs out.

A plan is a courtesy: no run ends because of it, and where there is none, a line says why.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import jax
from flax import nnx

from dsv3_jax.config import RunConfig
from dsv3_jax.plan.hardware import DEVICES, Hardware
from dsv3_jax.plan.memory import MemoryPlan, RankMemory, changes_of, memory_of
from dsv3_jax.plan.parameters import Parameters, parameters_of
from dsv3_jax.plan.prediction import predict
from dsv3_jax.train.machine import device_peak_memory, peak_memory

SHOWN_CHANGES = 3
Say = Callable[[str], None]


@dataclass(frozen=True)
class Planned:
    """Of one run on this machine's devices."""

    memory: MemoryPlan
    seconds: float = math.nan
    """Of a step with all rows; NaN if nothing is known"""

    @property
    def tokens_per_second(self) -> float:
        """Of all devices."""
        cfg = self.memory.cfg
        return cfg.train.rows * cfg.data.length / self.seconds

    def begin(self) -> str:
        """One line for the start of the run."""
        rank, cfg = self.memory.fullest, self.memory.cfg
        where = f" on rank {rank.rank}" if cfg.mesh.pipe > 1 else ""
        line = f"planned    {size_of(rank.total)} a device{where} ({terms_of(rank)})"
        line += f", up to {size_of(rank.workspace)} of workspace"
        if math.isfinite(self.seconds):
            line += f"; a step in {self.seconds:.3g} s"
        return line

    def end(self, tokens_per_second: float) -> str:
        """One line for its end: what was measured, and what was planned."""
        rank, devices = self.memory.fullest, self.memory.cfg.mesh.size
        held = rank.total + rank.workspace
        measured = device_peak_memory()
        if measured is not None:
            line = f"measured   {size_of(measured)} on the fullest device (planned {size_of(held)})"
        else:  # devices of a CPU share the process's memory with all else in it
            sizes = f"{devices} × {size_of(held)}" if devices > 1 else size_of(held)
            line = (
                f"measured   {size_of(peak_memory())} of the process at its peak, which may have "
            )
            line += f"been the compiler's (planned for the step alone {sizes})"
        if math.isfinite(tokens_per_second):
            line += f"; {tokens_per_second:,.0f} tokens/s"
            if math.isfinite(self.seconds):
                line += f" (planned {self.tokens_per_second:,.0f})"
        return line


def planned_of(
    cfg: RunConfig, params: nnx.State | None = None, say: Say = lambda line: None
) -> Planned | None:
    """Of a run, whose abstract weights need not be traced if they are at hand. None, and a line of
    the reason, if there is no plan of it.
    """
    try:
        memory = memory_of(cfg, Parameters(cfg, parameters_of(params) if params else ()))
        return Planned(memory, _seconds(cfg, hardware_of(jax.devices()[0].device_kind)))
    # The configuration has been checked, and the run needs nothing from here. So what fails is a
    # fault of the plan's own, of any kind: a layer or a recipe that it has not learned of, a key, a
    # division, an assertion. Days of training are worth more than its line, which names the fault.
    except Exception as error:
        fault = f"{type(error).__name__}: {_said(error)}"
        say(f"planned    nothing, since the plan failed ({fault}); the run goes on without")
        return None


def hardware_of(kind: str) -> Hardware | None:
    """Of a device's kind as JAX names it, such as NVIDIA H100 80GB HBM3. None if it is no known
    one.
    """
    words = re.findall(r"[a-z]+\d+", kind.lower())
    return next((DEVICES[word] for word in words if word in DEVICES), None)


def _seconds(cfg: RunConfig, hardware: Hardware | None) -> float:
    if hardware is None:
        return math.nan
    try:
        return predict(cfg, hardware).step.seconds
    except ValueError:  # these devices' figures say nothing of such a run
        return math.nan


def told_of_exhaustion(cfg: RunConfig, error: BaseException) -> str:
    """What ran out, what was planned on the fullest rank, and what would hold less: in one line."""
    line = f"out of memory: {_said(error)}"
    try:
        memory = memory_of(cfg)
        changes = changes_of(memory)[:SHOWN_CHANGES]
    except Exception:  # as above; and here memory may run out once more
        return f"{line}; smaller: train.rows, or more train.microbatches"
    rank = memory.fullest
    line += f"; planned on rank {rank.rank}: {terms_of(rank)}, workspace {size_of(rank.workspace)}"
    smaller = [f"{change.text} ({size_of(change.most)})" for change in changes]
    return f"{line}; smaller: {', '.join(smaller or ['train.rows, with as many micro-batches'])}"


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def is_exhaustion(error: BaseException) -> bool:
    """Whether memory ran out, on a device or on the host."""
    text = str(error).lower()
    words = ("out of memory", "resource_exhausted")
    return isinstance(error, MemoryError) or any(word in text for word in words)


def terms_of(rank: RankMemory) -> str:
    """What stays on a device of a rank, largest first."""
    terms = sorted(rank.persistent.items(), key=lambda term: -term[1])
    return ", ".join(f"{name} {size_of(size)}" for name, size in terms if size)


def size_of(size: float) -> str:
    """In GB, or MB below one."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
