"""XLA's flags for a node of Hopper GPUs, set before JAX is imported.

XLA ends a process that names a flag it does not know, and flags come and go with its versions: the
table says of each flag by which versions of jaxlib it has been tried, and for any other version
nothing is set. What the user's own XLA_FLAGS say stays as it is.
"""

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import NamedTuple

JAXLIBS = ("0.10.2", "0.11.2", "0.12.0")
"""Versions that every flag of the table has been tried with; 0.12.0 stands for 0.12.0.1 too"""


class Flag(NamedTuple):
    """One of XLA's, without its two dashes."""

    name: str
    value: str
    jaxlibs: tuple[str, ...]
    """That know it"""
    reason: str


# None of these has been measured yet: each is here for what it is documented to do.
FLAGS = (
    Flag(
        "xla_gpu_enable_latency_hiding_scheduler",
        "true",
        JAXLIBS,
        "gathers of masters, exchanges of tokens and sums of gradients start as early and are "
        "waited for as late as the program allows; the default order waits at once",
    ),
)


def apply(environment: MutableMapping[str, str]) -> None:
    """For a command that computes, before JAX is imported: adds to XLA_FLAGS where it would find
    a GPU.
    """
    if finds_gpu(environment):
        environment["XLA_FLAGS"] = with_flags(environment.get("XLA_FLAGS", ""), _jaxlib())


def with_flags(own: str, jaxlib: str) -> str:
    """XLA_FLAGS of the user's and, behind them, those of this version's that they do not name."""
    named = set(re.findall(r"--(\w+)", own))
    more = [f"--{flag.name}={flag.value}" for flag in known(jaxlib) if flag.name not in named]
    return " ".join([own, *more]).strip()


def known(jaxlib: str) -> Iterator[Flag]:
    """Those of the table that a version of jaxlib knows."""
    for flag in FLAGS:
        if any(jaxlib == version or jaxlib.startswith(f"{version}.") for version in flag.jaxlibs):
            yield flag


def finds_gpu(environment: Mapping[str, str], devices: Path = Path("/dev")) -> bool:
    """Whether JAX would compute on an NVIDIA GPU: there is one, JAX's plugin for it is installed,
    and the environment asks for no other platform.
    """
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return False
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    return any(devices.glob("nvidia[0-9]*")) and any(map(importlib.util.find_spec, plugins))


def _jaxlib() -> str:
    return importlib.metadata.version("jaxlib")
