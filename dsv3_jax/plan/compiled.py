"""What compiled programs of a run say, beside its plan."""

from collections.abc import Mapping
from dataclasses import dataclass

from dsv3_jax.plan.memory import MemoryPlan, RankMemory


@dataclass(frozen=True)
class Program:
    """One that is compiled."""

    name: str
    """F, b, W, B, FB, or a step's prepare, zeros, reduce, tally, update"""
    stages: str
    """Those that it is of, as cuts are written"""
    seconds: float
    """That its compilation took"""
    arguments: int
    results: int
    """Those in arguments' place included"""
    temporary: int
    """Bytes of XLA:CPU's own"""
    flops: float
    collectives: Mapping[str, int]


@dataclass(frozen=True)
class CompiledRank:
    """Bytes of one rank as its programs have them, beside the plan's."""

    planned: RankMemory
    weights: int
    state: int
    """Masters, moments, biases"""
    gradients: int
    live: int
    """Residuals and tapes at the fullest moment"""

    @property
    def total(self) -> int:
        """What stays between operations."""
        return self.weights + self.state + self.gradients + self.live


@dataclass(frozen=True)
class CompiledPlan:
    """Of a whole run."""

    plan: MemoryPlan
    programs: tuple[Program, ...]
    ranks: tuple[CompiledRank, ...]
    residuals: Mapping[str, tuple[int, int]]
    """Of a micro-batch, by the first stage of its kind, as `1: 4`: compiled, planned"""
    tapes: Mapping[str, tuple[int, int]]
    seconds: float
    peak_bytes: int
    """Of this process, at most"""
