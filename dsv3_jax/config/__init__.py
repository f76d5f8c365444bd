"""Configuration: dataclasses, presets, Hugging Face `config.json`, users' files. No JAX."""

from dsv3_jax.config.data import DataConfig
from dsv3_jax.config.mesh import MeshConfig
from dsv3_jax.config.model import ModelConfig, ParamCount, YarnConfig
from dsv3_jax.config.pipeline import PipelineConfig
from dsv3_jax.config.quant import QuantConfig
from dsv3_jax.config.run import (
    OptimizerConfig,
    OutputConfig,
    ParamGroup,
    RunConfig,
    TrainConfig,
)
from dsv3_jax.config.schedule import Phase, ScheduleConfig

__all__ = [
    "DataConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OutputConfig",
    "ParamCount",
    "ParamGroup",
    "Phase",
    "PipelineConfig",
    "QuantConfig",
    "RunConfig",
    "ScheduleConfig",
    "TrainConfig",
    "YarnConfig",
]
