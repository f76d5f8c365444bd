"""Weights, inputs and output gradients of a trained run's linears."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.checkpoint.run_model import read_model
from dsv3_jax.config import QuantConfig, RunConfig
from dsv3_jax.config.load import load_json
from dsv3_jax.data.corpus import build_corpus
from dsv3_jax.data.loader import Batch, stack
from dsv3_jax.data.tokenizer import load_tokenizer
from dsv3_jax.model.router import RouterBias
from dsv3_jax.quant.recipes import Operand
from dsv3_jax.quant.trained_weight import TrainedWeight
from dsv3_jax.train.loss import loss
from dsv3_jax.train.quantised import quantised, with_blocks
from dsv3_jax.train.step import TrainState

ROWS = 1024  # of each input and gradient, the first ones


class Trained(NamedTuple):
    """A run's state at a step, and a batch of its training rows."""

    cfg: RunConfig
    graphdef: nnx.GraphDef
    state: TrainState
    batch: Batch


class Tensors(NamedTuple):
    """Of one parameter, stacked over its layers where it is."""

    weight: jax.Array
    input: jax.Array
    gradient: jax.Array


def trained(run: Path, step: int | None = None) -> Trained:
    """The run's model as it stood, and the rows that it saw first."""
    cfg = load_json(run / "config.json")
    graphdef, params, biases = nnx.split(read_model(run, step).model, nnx.Param, RouterBias)
    tokenizer = load_tokenizer(run / "tokenizer.json")
    corpus = build_corpus(
        cfg.data, cfg.model.vocab_size, cfg.train.seed, lambda line: None, tokenizer
    )
    batch = jax.device_put(stack([corpus.train[i] for i in range(cfg.train.rows)]))
    return Trained(cfg, graphdef, TrainState(params, biases, None), batch)


def with_recipe(cfg: RunConfig, recipe: str, dtype: str) -> RunConfig:
    """The same run in another recipe and dtype of activations."""
    return replace(cfg, quant=QuantConfig(recipe), train=replace(cfg.train, dtype=dtype))


def first_rows(x: jax.Array, operand: Operand) -> jax.Array:
    """What is captured of a tensor, whatever its operand: for a tap."""
    del operand
    return x[:ROWS].astype(jnp.float32)


def tensors(of: Trained) -> dict[str, Tensors]:
    """By parameter: what enters its GEMMs in a step of the recipe fp8, before rounding."""
    params, rows = of.state.params, of.cfg.train.rows * of.cfg.data.length
    blocks = quantised(params, "fp8")
    taps = {name: _empty(name, b.shape, rows) for name, b in blocks.items()}
    valid_tokens = (of.batch.labels_BT >= 0).sum()

    @jax.jit
    def captured(taps):
        def total(taps):
            def watch(weight: TrainedWeight, name: str) -> TrainedWeight:
                return replace(weight, taps=taps[name], measure=first_rows)

            model = nnx.merge(
                of.graphdef, with_blocks(params, blocks, "fp8", watch), of.state.biases
            )
            return loss(model, of.batch, valid_tokens, 0.3, of.cfg.train)[0]

        return jax.grad(total)(taps)

    weights = {}
    jax.tree_util.tree_map_with_path(lambda path, x: weights.update({_name(path): x}), params)
    return {name: Tensors(weights[name], *pair) for name, pair in captured(taps).items()}


def _empty(name: str, shape: tuple[int, ...], rows: int) -> tuple[jax.Array, jax.Array]:
    layers = shape[:1] if name.split(".")[0] in ("dense_layers", "moe_layers") else ()
    rows = min(ROWS, rows)
    # Gate and up are one product.
    width = shape[-1] * (2 if "w_gate" in name or "w_up" in name else 1)
    return jnp.zeros((*layers, rows, shape[-2])), jnp.zeros((*layers, rows, width))


def _name(path: tuple) -> str:
    from dsv3_jax.train.optimizer import parameter_name

    return parameter_name(path)
