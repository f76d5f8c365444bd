"""An engine's options on a command line. Loads no JAX."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import tyro

from dsv3_jax.config.mesh import MeshConfig
from dsv3_jax.inference.settings import EngineConfig


@dataclass(frozen=True)
class MeshOptions:
    """Devices that texts and experts are spread over."""

    data: int = 1
    """Groups of node x local devices, each of which holds all experts"""
    node: int = 1
    """Nodes that a group's experts are spread over"""
    local: int = 1
    """Devices in a node"""


@dataclass(frozen=True)
class EngineOptions:
    """Rows and pages are one device's."""

    rows: int | None = None
    """Texts that go on at the same time; default: 16, or fewer if fewer are given"""
    drafts: int = EngineConfig.drafts
    """Tokens that MTP modules draft for each step; at most as many as the model has modules"""
    fp8_cache: Annotated[bool, tyro.conf.FlagCreatePairsOff] = EngineConfig.fp8_cache
    """Keep c_kv in E4M3 with a scale for each 128"""
    page_slots: int = EngineConfig.page_slots
    """Tokens of a page of the cache"""
    pages: int | None = None
    """Of the cache; default: as many as the longest texts in all rows need"""
    chunk: int = EngineConfig.chunk
    """Most tokens of a prompt that are read between two steps"""
    devices: int | None = None
    """Emulate this many devices on the CPU; the axes of mesh multiply to it"""
    mesh: MeshOptions = field(default_factory=MeshOptions)

    def check(self) -> None:
        """ValueError, in the names of the options, for what no model allows."""
        self.settings([])
        self.mesh_config()

    def settings(self, lengths: Sequence[int]) -> EngineConfig:
        """For texts that have at most so many tokens each, prompt and answer: no more rows than
        there are texts for, and pages for the longest of them in all rows.
        """
        shards = self.mesh_config().token_shards
        rows = max(min(EngineConfig.rows, -(-len(lengths) // shards)), 1)
        rows = rows if self.rows is None else self.rows
        with own_names():
            settings = EngineConfig(
                rows=rows,
                drafts=self.drafts,
                fp8_cache=self.fp8_cache,
                page_slots=self.page_slots,
                pages=self.pages,
                chunk=self.chunk,
            )
        longest = sorted(lengths, reverse=True)[:rows]
        needed = sum(-(-length // settings.page_slots) for length in longest)
        return replace(settings, pages=needed or None) if self.pages is None else settings

    def mesh_config(self) -> MeshConfig:
        """The mesh, of one device by default."""
        return MeshConfig(data=self.mesh.data, node=self.mesh.node, local=self.mesh.local)


@contextlib.contextmanager
def own_names() -> Iterator[None]:
    """Errors name options, where an engine's own name its fields."""
    try:
        yield
    except ValueError as error:
        text = re.sub(
            r"\bengine\.(\w+)", lambda match: f"--{match[1].replace('_', '-')}", str(error)
        )
        raise ValueError(text) from error
