"""Programs that misbehave, in a box or without, and what the host then shows of them."""

from pathlib import Path

from dsv3_jax.posttrain.code_runner import Program, Ran, Runner
from dsv3_jax.posttrain.containment import Box
from dsv3_jax.posttrain.sandbox.limits import Limits

SMALL = Limits(seconds=60.0, cpu_seconds=5, memory_bytes=256 << 20, processes=8)


def run(box: Box | None, source: str, limits: Limits = SMALL, **more) -> Ran:
    return Runner(box, limits).run(Program(("main.py",), {"main.py": source}, **more))


def processes_with(mark: str) -> list[str]:
    """Of the host, by their command lines."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if mark.encode() in line:
            found.append(folder.name)
    return found
