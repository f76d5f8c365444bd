"""Configuration: dataclasses, presets, Hugging Face `config.json`, users' files. No JAX."""

from dsv3_jax.config.model import ModelConfig, ParamCount, YarnConfig
from dsv3_jax.config.run import (
    DataConfig,
    OptimizerConfig,
    OutputConfig,
    Phase,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OutputConfig",
    "ParamCount",
    "Phase",
    "RunConfig",
    "ScheduleConfig",
    "TrainConfig",
    "YarnConfig",
]
