"""A sample in a packed row is computed as if it were alone; what fine-tuning changes of a run."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import Phase, TrainConfig
from dsv3_jax.config.presets import tiny_run
from dsv3_jax.data.answers import Sample
from dsv3_jax.data.loader import Batch, batch_at
from dsv3_jax.data.samples import SampleRows, Samples
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.posttrain.sft import check_fine_tuning, fine_tuning_of
from dsv3_jax.train.loss import loss
from tests.shapes import compiled, random_model, tiny_model
from tests.tolerances import FLOAT64, assert_close

MODEL = tiny_model(num_layers=2)
LENGTH = 24
SIZES = (5, 9, 12, 7, 3, 20, 2, 8)  # tokens


def samples() -> Samples:
    draw = np.random.default_rng(0)
    made = []
    for size in SIZES:
        answer = draw.random(size) < 0.6
        answer[-1] = True
        made.append(Sample(draw.integers(2, 64, size).astype(np.int32), answer))
    return Samples(made, [str(size) for size in SIZES], eos_id=1)


@compiled
def outputs(model: DeepSeekV3, batch: Batch):
    """Logits of the main model and of MTP, and the loss's parts times the number of labels."""
    valid_BT = batch.labels_BT >= 0
    h_BTD, _ = model.hidden(batch.tokens_BT, valid_BT, segments_BT=batch.segments_BT)
    ((mtp_BTD, _),) = model.mtp_hidden(
        h_BTD, batch.tokens_BT, valid_BT, segments_BT=batch.segments_BT
    )
    one = jnp.ones((), h_BTD.dtype)
    cfg = TrainConfig(dtype=str(h_BTD.dtype))
    _, parts = loss(model, batch, one, one, cfg)
    return model.logits(h_BTD), model.logits(mtp_BTD), parts.main, parts.mtp


def test_a_packed_sample_is_computed_as_if_it_were_alone(x64):
    """Logits and losses, MTP's too; several samples share a row."""
    model = random_model(MODEL, jnp.float64)
    rows = SampleRows(samples(), LENGTH, seed=1)
    batch = batch_at(rows, 0, len(rows))
    packed = jax.device_get(outputs(model, batch))
    assert batch.segments_BT.max() >= 2
    main = mtp = 0.0
    for row in range(len(rows)):
        for segment, name in enumerate(rows.names_of(row)):
            own = batch.segments_BT[row] == segment
            size = int(name) - 1
            # In the front of a row of its own; one length for all, so that one program does.
            alone = Batch(*(np.full((1, LENGTH), fill, np.int32) for fill in (1, -1, 1)))
            for whole, part in zip(alone[:3], batch[:3], strict=True):
                whole[0, :size] = part[row, own]
            alone.segments_BT[0, :size] = 0
            found = jax.device_get(outputs(model, alone))
            assert_close(packed[0][row, own], found[0][0, :size], FLOAT64)
            # The last token of a segment has none behind it: nothing is predicted from there.
            assert_close(packed[1][row, own][:-1], found[1][0, : size - 1], FLOAT64)
            main, mtp = main + found[2], mtp + found[3]
    assert_close((packed[2], packed[3]), (main, mtp), FLOAT64)


def test_a_change_of_one_sample_changes_no_other(x64):
    """The same program, so bit for bit; without isolation it would."""
    model = random_model(MODEL, jnp.float64)
    rows = SampleRows(samples(), LENGTH, seed=1)
    batch = batch_at(rows, 0, len(rows))
    changed = batch.tokens_BT.copy()
    changed[batch.segments_BT == 0] = 7
    one, two = (
        jax.device_get(outputs(model, batch._replace(tokens_BT=tokens_BT))[0])
        for tokens_BT in (batch.tokens_BT, changed)
    )
    others = batch.segments_BT > 0
    np.testing.assert_array_equal(one[others], two[others])
    assert not np.array_equal(one[~others], two[~others])


def test_fine_tuning_keeps_the_runs_shape_and_takes_the_reports_recipe():
    base = tiny_run()
    data = replace(base.data, fim_rate=0.1, split_rate=0.1, source=("a", "b"), weights=(1.0, 2.0))
    phases = (Phase(0, 10**6, 1e-3),)
    schedule = replace(base.schedule, learning_rate_phases=phases, rows_phases=(Phase(0, 9, 8.0),))
    tuned = fine_tuning_of(replace(base, data=data, schedule=schedule))
    check_fine_tuning(tuned)
    assert (tuned.model, tuned.train, tuned.mesh) == (base.model, base.train, base.mesh)
    assert (tuned.data.length, tuned.data.isolate) == (base.data.length, True)
    found = tuned.schedule
    assert (found.learning_rate, found.final_learning_rate) == (5e-6, 1e-6)
    assert (found.warmup_steps, found.learning_rate_phases, found.rows_phases) == (0, (), ())
    with pytest.raises(ValueError, match=r"data\.format is text; allowed for fine-tuning: me"):
        check_fine_tuning(base)
