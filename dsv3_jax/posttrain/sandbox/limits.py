"""What a program may use, and the system's own limits (setrlimit) that hold it to most of that."""

import resource
from typing import NamedTuple


class Limits(NamedTuple):
    """Of one program with all processes that it starts, where nothing else is said."""

    seconds: float = 15.0
    """By the clock on the wall"""
    cpu_seconds: int = 10
    """Of each process"""
    memory_bytes: int = 512 << 20
    """Address space of each process, and resident memory of all of them"""
    file_bytes: int = 16 << 20
    """Of each file"""
    folder_bytes: int = 64 << 20
    """Of all files in its folder, in a box"""
    processes: int = 16
    """Threads count as such; without a box, beside those that the user has already"""
    open_files: int = 64
    """Of each process"""
    output_bytes: int = 64 << 10
    """What it prints, on both streams"""


def hold(limits: Limits, processes: int) -> None:
    """This process and its children, for good; a system that already allows less stays as it is.
    `processes` of this user altogether; root's are not counted.
    """
    cpu = limits.cpu_seconds
    _lower(resource.RLIMIT_CPU, cpu, cpu + 1)  # SIGXCPU, which can be ignored; then SIGKILL
    _lower(resource.RLIMIT_AS, limits.memory_bytes)
    _lower(resource.RLIMIT_FSIZE, limits.file_bytes)
    _lower(resource.RLIMIT_NOFILE, limits.open_files)
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_NPROC, processes)


def _lower(kind: int, soft: int, hard: int | None = None) -> None:
    allowed = resource.getrlimit(kind)[1]
    most = hard if hard is not None else soft
    if allowed != resource.RLIM_INFINITY:
        most = min(most, allowed)
    resource.setrlimit(kind, (min(soft, most), most))
