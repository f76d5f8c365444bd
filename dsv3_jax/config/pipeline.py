"""How a run's model is cut into pipeline stages, and in which order they work."""

from dataclasses import dataclass
from typing import Literal

from dsv3_jax.config.fields import check_types

ScheduleName = Literal["gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev"]


@dataclass(frozen=True)
class PipelineConfig:
    """Of a run with mesh.pipe above 1 (report 3.2.1)."""

    schedule: ScheduleName = "1f1b"
    """Order of forward and backward passes. dualpipe keeps two copies of the weights; dualpipev
    cuts the model into twice as many stages. Steps of a batch ramp that have too few micro-batches
    for it run as 1f1b, but not those of dualpipev"""
    stages: str = ""
    """Stages between |, each of embedding E, a number of layers, head H, MTP modules M, joined by
    +, as in E+2|2|1+H+M. Empty: balanced by estimated cost"""

    def __post_init__(self) -> None:
        check_types("pipeline", self)
