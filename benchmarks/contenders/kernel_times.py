"""Where a program's time goes on the device: its kernels in a trace, by the code they come from."""

import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Kernel(NamedTuple):
    """All launches of one instruction of a program."""

    instruction: str
    """Of the compiled program"""
    source: str
    """What the instruction says of its origin in the traced code; "" where it says nothing"""
    kernel: str
    """The device's name of it"""
    launches: int
    seconds: float


@dataclass(frozen=True)
class Times:
    """Of one run of a program."""

    kernels: list[Kernel]
    """Those that took longest first"""

    @property
    def seconds(self) -> float:
        """Of all together, one after the other"""
        return sum(kernel.seconds for kernel in self.kernels)

    def lines(self, most: int) -> Iterator[str]:
        """A table of those that took longest."""
        yield f"{self.seconds * 1e3:,.1f} ms in {len(self.kernels):,} kinds of kernels; longest:"
        for each in self.kernels[:most]:
            share, name = each.seconds / self.seconds, each.source or each.instruction
            yield (
                f"{each.seconds * 1e3:9.2f} ms {share:6.1%} {each.launches:6,} x  "
                f"{name[-110:]}  [{each.kernel[:40]}]"
            )


def traced(run: Any, program: str) -> Times:
    """Calls `run()` under the profiler. `program` is the compiled text of what it runs."""
    sources = dict(_origins(program))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    with warnings.catch_warnings():  # where they are errors, one about a type of JAX's ends Python
        warnings.simplefilter("ignore", DeprecationWarning)
        return Times(_kernels(data, sources))


def _origins(program: str) -> Iterator[tuple[str, str]]:
    """(instruction, origin) of every line of a compiled program that tells it."""
    found = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = .*op_name=\"([^\"]*)\"", re.MULTILINE)
    for match in found.finditer(program):
        yield match[1], match[2]


def _kernels(data: Any, sources: Mapping[str, str]) -> list[Kernel]:
    totals: dict[tuple[str, str], list[float]] = {}
    for event in _events(data):
        stats = dict(event.stats)
        total = totals.setdefault((str(stats.get("hlo_op", "")), event.name), [0, 0.0])
        total[0] += 1
        total[1] += event.duration_ns / 1e9
    kernels = [
        Kernel(op, sources.get(op, ""), name, int(count), seconds)
        for (op, name), (count, seconds) in totals.items()
    ]
    return sorted(kernels, key=lambda kernel: -kernel.seconds)


def _events(data: Any) -> Iterator[Any]:
    """What ran: on a GPU all of its streams, on a CPU what belongs to a program."""
    for plane in data.planes:
        for line in plane.lines:
            if plane.name.startswith("/device:GPU:"):
                if line.name.startswith("Stream"):  # other lines sum up these
                    yield from line.events
            elif plane.name.startswith("/host:CPU"):
                yield from (event for event in line.events if "hlo_op" in dict(event.stats))
