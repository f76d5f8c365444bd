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

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
DEVICES = Path("/dev")
# Bytes that one collective may take: 0.4 ms over a Hopper's NVLink, beside which its latency of
# tens of us is small; XLA's own 30 MiB take 0.09 ms. The buffers are as large, of 80 GB.
COMBINED = str(128 << 20)


class Flag(NamedTuple):
    """One of XLA's, without its two dashes."""

    name: str
    value: str
    jaxlibs: tuple[str, ...]
    """That know it"""
    reason: str


# What each is documented to do is the reason for it; none has been measured by this project yet.
FLAGS = (
    Flag(
        "xla_gpu_enable_latency_hiding_scheduler",
        "true",
        JAXLIBS,
        "gathers of masters, exchanges of tokens and sums of gradients begin as early and are "
        "waited for as late as the program allows; in plain order they are waited for at once",
    ),
    Flag(
        "xla_gpu_all_gather_combine_threshold_bytes",
        COMBINED,
        JAXLIBS,
        "masters are gathered parameter by parameter, in front of the first forward pass",
    ),
    Flag(
        "xla_gpu_reduce_scatter_combine_threshold_bytes",
        COMBINED,
        JAXLIBS,
        "gradients are summed parameter by parameter, behind the last backward pass",
    ),
)


def apply(environment: MutableMapping[str, str]) -> None:
    """For a command that computes, before JAX is imported: adds to XLA_FLAGS where it would find
    a GPU.
    """
    if finds_gpu(environment):
        environment["XLA_FLAGS"] = with_flags(environment.get("XLA_FLAGS", ""), _jaxlib())


def with_flags(own: str, jaxlib: str) -> str:
    """XLA_FLAGS of the user's and, behind them, those of this version's that they do not name.
    What does not begin with a dash is the name of a file of flags, and stays as it is.
    """
    if own.strip() and not own.lstrip().startswith("-"):
        return own
    named = set(re.findall(r"--(\w+)", own))
    more = [f"--{flag.name}={flag.value}" for flag in known(jaxlib) if flag.name not in named]
    return " ".join([own, *more]).strip()


def known(jaxlib: str) -> Iterator[Flag]:
    """Those of the table that a version of jaxlib knows."""
    for flag in FLAGS:
        if any(jaxlib == version or jaxlib.startswith(f"{version}.") for version in flag.jaxlibs):
            yield flag


def finds_gpu(environment: Mapping[str, str]) -> bool:
    """Whether JAX would compute on an NVIDIA GPU: there is one, JAX's plugin for it is installed,
    and the environment asks for no other platform.
    """
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return False
    return any(DEVICES.glob("nvidia[0-9]*")) and any(map(importlib.util.find_spec, PLUGINS))


def _jaxlib() -> str:
    return importlib.metadata.version("jaxlib")
