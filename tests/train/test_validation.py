"""Loss on held-out rows against a slow loop, and which rows are taken on the way."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dsv3_jax.config import DataConfig, RunConfig, TrainConfig
from dsv3_jax.data.packing import Rows
from dsv3_jax.data.tokenised import TokenizedCorpus
from dsv3_jax.model.router import RouterBias
from dsv3_jax.train.step import TrainState
from dsv3_jax.train.validation import make_validate, spread, text_of
from tests.runs import SmallRun
from tests.shapes import TINY, compiled, random_model
from tests.tolerances import FLOAT64

LENGTH = 8
CFG = RunConfig(
    model=TINY,
    data=DataConfig(length=LENGTH),
    train=TrainConfig(rows=4, microbatches=2, dtype="float64"),
)


def corpus_of(*lengths: int) -> TokenizedCorpus:
    """Documents of random ids that end with 1, the ids' end of sentence."""
    ids = np.random.default_rng(0).integers(2, TINY.vocab_size, sum(lengths)).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids[offsets[1:] - 1] = 1
    return TokenizedCorpus(ids, offsets)


ROWS = Rows(corpus_of(13, 5, 19), LENGTH)  # 37 tokens: 5 rows, the last with 5 labels of 8
BYTES_V = np.random.default_rng(1).integers(0, 5, TINY.vocab_size).astype(np.int32)


Model = tuple[nnx.GraphDef, TrainState, np.ndarray]


@pytest.fixture(scope="module")
def model() -> Model:
    """A float64 model in two parts, and its logits of all rows."""
    with jax.enable_x64(True):
        model = random_model(TINY, jnp.float64)
        logits_BTV = compiled(model)(np.stack([row.tokens_T for row in ROWS]))
    graphdef, params, biases = nnx.split(model, nnx.Param, RouterBias)
    return graphdef, TrainState(params, biases, optax.EmptyState()), np.asarray(logits_BTV)


def slowly(logits_BTV: np.ndarray, indices: list[int]) -> tuple[float, int, int]:
    """(nats, labels, bytes) of some rows, label by label."""
    nats, labels, size = 0.0, 0, 0
    for index in indices:
        for t, label in enumerate(ROWS[index].labels_T):
            if label < 0:
                continue
            logits_V = logits_BTV[index, t]
            top = logits_V.max()
            nats += top + math.log(np.exp(logits_V - top).sum()) - logits_V[label]
            labels += 1
            size += int(BYTES_V[label])
    return nats, labels, size


@pytest.mark.parametrize("rows", [4, 16])  # batches of 2, the last half empty; one batch of 8
def test_validation_is_the_slow_loop_over_labels(
    small: SmallRun, x64: None, model: Model, rows: int
):
    graphdef, state, logits_BTV = model
    validate = make_validate(graphdef, replace(CFG, train=replace(CFG.train, rows=rows)), BYTES_V)
    for indices in ([0, 1, 2, 3, 4], [1, 4], [3]):
        nats, labels, size = slowly(logits_BTV, indices)
        with small.quick():
            found = validate(state, ROWS, indices)
        assert found.rows == len(indices)
        assert found.bytes == size
        assert found.loss == pytest.approx(nats / labels, rel=FLOAT64)
        assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=FLOAT64)
    assert slowly(logits_BTV, list(range(5)))[1] == 37  # padding is no label


def test_every_byte_of_the_held_out_text_is_a_label_once():
    pieces = [bytes([97 + i % 26]) * int(size) for i, size in enumerate(BYTES_V)]
    expected = b"".join(pieces[i] for i in ROWS.corpus.tokens)
    assert text_of(ROWS, pieces) == expected
    assert len(expected) == BYTES_V[ROWS.corpus.tokens].sum()


@pytest.mark.parametrize("total", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("wanted", [1, 3, 64])
def test_rows_on_the_way_are_spread_evenly(total: int, wanted: int):
    indices = spread(total, wanted)
    assert len(indices) == len(set(indices)) == min(total, wanted)
    assert indices[0] == 0
    gaps = np.diff([*indices, total])
    assert gaps.max() - gaps.min() <= 1
    assert spread(total, total + 5) == list(range(total))
