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
from dsv3_jax.parallel.mesh import is_stacked
from dsv3_jax.quant.recipes import FP8, Operand
from dsv3_jax.quant.trained_weight import Taps
from dsv3_jax.train.loss import loss
from dsv3_jax.train.quantized_weights import attach, quantize_weights, quantized
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


def first_rows(x_xMD: jax.Array, operand: Operand) -> jax.Array:
    """What is captured of a tensor, whatever its operand: for a tap."""
    del operand
    return x_xMD.reshape(-1, x_xMD.shape[-1])[:ROWS].astype(jnp.float32)


def tensors(of: Trained) -> dict[str, Tensors]:
    """By parameter: what enters its GEMMs in a step of the recipe fp8, before rounding."""
    params, rows = of.state.params, of.cfg.train.rows * of.cfg.data.length
    blocks = quantize_weights(params, FP8)
    valid_tokens = (of.batch.labels_BT >= 0).sum()

    @jax.jit
    def captured(taps):
        def total(taps):
            model = nnx.merge(of.graphdef, attach(params, blocks, FP8, taps), of.state.biases)
            return loss(model, of.batch, valid_tokens, 0.0, of.cfg.train)[0]

        return jax.grad(total)(taps)

    found = captured({name: _zero_taps(name, b.shape, rows) for name, b in blocks.items()})
    return {
        name: Tensors(master, found[name].input, found[name].grad_output)
        for name, master, _ in quantized(params, FP8)
    }


def _zero_taps(name: str, shape: tuple[int, ...], rows: int) -> Taps:
    size = (*shape[: is_stacked(name)], min(ROWS, rows))
    # Gate and up are one product.
    width = shape[-1] * (2 if "w_gate" in name or "w_up" in name else 1)
    return Taps(jnp.zeros((*size, shape[-2])), jnp.zeros((*size, width)), first_rows)
