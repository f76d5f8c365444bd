"""Where a trained run's model sends tokens: the experts of each one, and what can be counted."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.checkpoint.run_model import read_model
from dsv3_jax.config import RunConfig
from dsv3_jax.data.corpus import build_corpus
from dsv3_jax.data.packing import Row, Rows
from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer
from dsv3_jax.model.router import max_violation
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.train.validation import spread


class Trained(NamedTuple):
    """A run's newest model, and the text that it never saw."""

    model: DeepSeekV3
    cfg: RunConfig
    tokenizer: Tokenizer
    held_out: Rows
    step: int


class Balance(NamedTuple):
    """Means over the layers: MaxVio, and the smallest load of an expert over the layer's mean."""

    max_violation: float
    smallest: float


def trained(run: Path) -> Trained:
    """A finished run's model and held-out text."""
    found = read_model(run)
    tokenizer = load_tokenizer(run / "tokenizer.json")
    data, seed = found.cfg.data, found.cfg.train.seed
    corpus = build_corpus(
        data, found.cfg.model.vocab_size, seed, lambda line: None, tokenizer=tokenizer
    )
    return Trained(found.model, found.cfg, tokenizer, corpus.validation, found.step)


def some(rows: Rows, wanted: int) -> list[Row]:
    """So many rows, evenly over all; fewer where there are not as many."""
    return [rows[index] for index in spread(len(rows), wanted)]


def choices(model: DeepSeekV3, rows: Sequence[Row], dtype: str) -> np.ndarray:
    """Whether a token goes to an expert, bool [L, T, E]: T counts the rows' tokens that have a
    label, L the main model's MoE layers.
    """
    graphdef, state = nnx.split(model)
    chosen = [
        np.asarray(_of_row(graphdef, dtype, state, row.tokens_T[None]))[:, row.labels_T >= 0]
        for row in rows
    ]
    return np.concatenate(chosen, axis=1)


@partial(jax.jit, static_argnums=(0, 1))
def _of_row(
    graphdef: nnx.GraphDef, dtype: str, state: nnx.State, tokens_1T: jax.Array
) -> jax.Array:
    """bool [L, T, E]."""
    model = nnx.merge(graphdef, state)

    def of_token(counted_T: jax.Array) -> jax.Array:
        _, stats = model.hidden(tokens_1T, counted_T[None], jnp.dtype(dtype))
        return stats.load_E

    # A router tells its load over the tokens that count. Where one counts, that is its choice; what
    # does not depend on which one counts, vmap leaves computed once.
    load_TLE = jax.vmap(of_token)(jnp.eye(tokens_1T.shape[1], dtype=bool))
    return load_TLE.transpose(1, 0, 2) > 0


def balance_of(load_LE: np.ndarray) -> Balance:
    """Of counts, over however many tokens they are: the more, the less is chance."""
    relative_LE = relative(load_LE)
    violation_L = max_violation(jnp.asarray(load_LE, jnp.int32))
    return Balance(float(violation_L.mean()), float(relative_LE.min(-1).mean()))


def relative(load_LE: np.ndarray) -> np.ndarray:
    """Load over the layer's mean: 1 is balance."""
    return load_LE / load_LE.mean(-1, keepdims=True)


def nodes_of(chosen_LTE: np.ndarray, num_nodes: int) -> np.ndarray:
    """On how many nodes each token's experts lie [L, T]; a node holds a block of experts."""
    layers, tokens, _ = chosen_LTE.shape
    return chosen_LTE.reshape(layers, tokens, num_nodes, -1).any(-1).sum(-1)


def held_out_choices(path: Path, rows: int) -> tuple[Trained, np.ndarray]:
    """A run's newest model, and what it chooses on some rows that it never saw: `choices`."""
    of = trained(path)
    return of, choices(of.model, some(of.held_out, rows), of.cfg.train.dtype)


def whole_validation(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A finished run's entry about the whole held-out split."""
    (whole,) = [entry for entry in entries if entry["kind"] == "validation" and entry["whole"]]
    return whole
