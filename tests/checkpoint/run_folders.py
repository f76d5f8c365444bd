"""Run folders as training leaves them, made without training."""

import json
from dataclasses import replace
from pathlib import Path

import jax
from flax import nnx

from dsv3_jax.checkpoint import store
from dsv3_jax.checkpoint.names import to_layers
from dsv3_jax.config import DataConfig, OptimizerConfig, RunConfig
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.model.router import RouterBias
from tests.shapes import random_model, tiny_model

CFG = RunConfig(
    model=tiny_model(vocab_size=300, num_layers=1, num_dense_layers=0, mtp_depth=0, max_length=64),
    data=DataConfig(length=16),
)


def write_run(path: Path, *steps: int, average: bool = False, mtp_depth: int = 0) -> Path:
    """A run with checkpoints of these steps; a step's weights are those of `random_model` with
    the step as its seed, their average is twice that.
    """
    model = replace(CFG.model, mtp_depth=mtp_depth)
    cfg = replace(CFG, model=model, optimizer=OptimizerConfig(ema_decay=0.5 if average else 0))
    path.mkdir()
    (path / "config.json").write_text(cfg.to_json())
    train_tokenizer(["some text"], 262).save(path / "tokenizer.json")
    for step in steps:
        _, params, biases = nnx.split(random_model(cfg.model, seed=step), nnx.Param, RouterBias)
        arrays = {"params": to_layers(params, 0), "router_bias": to_layers(biases, 0)}
        if average:
            arrays["average"] = to_layers(jax.tree.map(lambda x: 2 * x, params), 0)
        meta = {"config": json.loads(cfg.to_json()), "step": step}
        store.save(path / "checkpoints", step, arrays, meta)
    return path
