"""Options of the benchmarks that start contenders, and what becomes of their figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from contenders.side_by_side import Allocator, Contender
from contenders.table import write_figures

from dsv3_jax.config.fields import check


@dataclass(frozen=True)
class ContestOptions:
    """Who is compared, and how long."""

    torch_python: str | None = None
    """Interpreter with torch and transformers"""
    python: tuple[str, ...] = ()
    """Further interpreters that have this project, with other versions of JAX"""
    qualify: int = 2
    """Rounds that choose the baselines"""
    rounds: int = 9
    """Alternating rounds after them"""
    warm_up: int = 2
    """Turns before the first round, compilation among them"""
    allocator: Allocator = "tuned"
    """Of all contenders: settings against page faults, or the system's own"""
    out: Path | None = None
    """JSON file that keeps the figures"""

    def __post_init__(self) -> None:
        for name in ("qualify", "rounds", "warm_up"):
            value = getattr(self, name)
            check(f"--{name.replace('_', '-')}", value, value >= 1, "at least 1")

    @property
    def interpreters(self) -> list[str]:
        """All that were named."""
        return [p for p in (*self.python, self.torch_python) if p]


def tell_figures(
    options: ContestOptions, ran: Sequence[Contender], sizes: str, lines: Sequence[str]
) -> None:
    """Prints the machine, sizes of the work and the table, and keeps the figures if asked to."""
    from dsv3_jax.train.machine import describe  # JAX comes in here, not before --help

    machine = f"{describe()}; allocator {options.allocator}; {sizes}"
    lines = [machine, "", *lines]
    print("\n".join(lines))
    if options.out:
        write_figures(options.out, ran, lines, interpreters=options.interpreters, machine=machine)
