"""This project's model as a contender has it: random weights, or a run's, by its options."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from flax import nnx

from dsv3_jax.checkpoint.run_model import read_model
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.presets import tiny_run
from dsv3_jax.config.run import from_dict
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.train.step import abstract_state, init_state


def model_of(options: dict[str, Any]) -> DeepSeekV3:
    """In float32: of the newest step of the folder `run`, or of the sizes `model` without it."""
    if options.get("run"):
        return read_model(Path(options["run"])).model
    cfg = replace(tiny_run(), model=from_dict(ModelConfig, options["model"]))
    state = init_state(cfg)
    graphdef, _ = abstract_state(cfg)
    return nnx.merge(graphdef, state.params, state.biases)
