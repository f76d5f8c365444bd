"""The step on a pipeline is the step on one device: loss, every gradient, every weight and moment,
metrics, router biases.

In float64, where a missing or doubled term is far above rounding. One device is the oracle.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from dsv3_jax.parallel.schedules import NAMES, simulate
from dsv3_jax.train.pipeline_state import from_whole, to_whole
from tests.tolerances import FLOAT32, FLOAT64, assert_close
from tests.train.pipelines import (
    CLIP,
    Case,
    Outcome,
    Walked,
    batch_of,
    expected,
    margin_of,
    numbers,
    state_for,
    walked,
    without_traffic,
)

# The least micro-batches that make every kind of program appear: F, B, FB, b, W.
DUALPIPE = Case("dualpipe", "2x1x2", 4, "E+1|H+M", layers=1, rows=2)

LAST_PLACE = 2**-23  # of float32: where sums differ in float64's last places, so may its rounding


def compare(found: Walked, case: Case) -> None:
    """With one device's; without weights in float32, where Adam's division by the gradient's own
    size makes of a small one's rounding a large one's. Clipping is at work.
    """
    outcome, plain = found.outcome, expected(case.plain)
    if case.dtype == "float64":
        (wide, narrow), (wide_plain, narrow_plain) = map(by_width, (outcome, plain))
        assert_close(wide, wide_plain, FLOAT64)
        assert_close(narrow, narrow_plain, LAST_PLACE)
    else:
        assert_close(rounded(outcome), rounded(plain), FLOAT32)
    assert outcome.metrics.applied
    assert outcome.metrics.grad_norm > CLIP
    assert found.executed.peak == dict(enumerate(simulate(found.schedule).peak))


def by_width(outcome: Outcome) -> tuple[dict, dict]:
    """What is float64, or not a float; and moments, which are stored in float32 here too."""
    leaves = jax.tree_util.tree_leaves_with_path(without_traffic(outcome))
    named = {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}
    narrow = {name for name, x in named.items() if x.dtype == np.float32}
    assert not any(".grads" in name or ".params" in name for name in narrow)
    return tuple(
        {name: x for name, x in named.items() if (name in narrow) == chosen}
        for chosen in (False, True)
    )


def rounded(outcome: Outcome) -> Any:
    metrics = outcome.metrics
    return outcome.grads, metrics.loss, metrics.parts, metrics.grad_norm, metrics.bias_LE


def check(case: Case) -> Walked:
    with jax.enable_x64(case.dtype == "float64"):
        found = walked(case)
        compare(found, case)
    return found


@pytest.fixture(scope="module")
def dualpipe() -> Iterator[Walked]:
    with jax.enable_x64(True):
        yield walked(DUALPIPE)


def test_all_is_as_on_one_device(x64, dualpipe: Walked):
    """And every rank holds as many sets at once as the simulator says."""
    compare(dualpipe, DUALPIPE)


def test_that_step_had_every_kind_of_program_and_overflow_rounds(dualpipe: Walked):
    kinds = {op.kind for rank in range(2) for op in dualpipe.schedule.operations(rank)}
    assert kinds == {"F", "B", "FB", "b", "W"}
    traffic = dualpipe.outcome.metrics.traffic
    assert (traffic.total.rounds > DUALPIPE.microbatches * DUALPIPE.devices).all()
    assert (traffic.most_rounds_L > DUALPIPE.microbatches).all()
    copies = DUALPIPE.microbatches * DUALPIPE.devices * DUALPIPE.rows * 5 * 2
    assert traffic.total.received.tolist() == [copies]


def test_a_bad_row_is_named_by_its_place_in_the_batch(x64, dualpipe: Walked):
    """And nothing of it reaches any weight."""
    pipeline, batch = dualpipe.pipeline, batch_of(DUALPIPE)
    _, state = state_for(DUALPIPE)
    embed_VD = state.params["embed_VD"]
    state.params["embed_VD"] = embed_VD.replace(embed_VD[...].at[63].set(np.nan))
    tokens_BT, labels_BT = batch.tokens_BT % 63, batch.labels_BT.copy()
    for row in (3, 14):  # of different devices and, on different ranks, of either direction
        tokens_BT[row, 0], labels_BT[row] = 63, 1
    before = jax.tree.map(np.array, state)
    after, metrics = pipeline.step(
        from_whole(pipeline.layout, before),
        batch._replace(tokens_BT=tokens_BT, labels_BT=labels_BT),
        numbers(),
    )
    assert not metrics.applied
    assert np.flatnonzero(~np.asarray(metrics.row_is_finite_B)).tolist() == [3, 14]
    after = jax.device_get(to_whole(pipeline.layout, after))
    jax.tree.map(np.testing.assert_array_equal, after, before)


# --- other schedules, meshes, models -------------------------------------------------------------

PAIRWISE = [
    Case("zb1p", "4x1x1", 3, "E|1|1+H|M", layers=2, remat="report"),
    Case("1f1b", "2x2x1", 3, layers=2, mtp=0, skewed=True, data=2),
    Case("dualpipev", "2x1x1", 5, "E|2|H|M", layers=2, isolate=True, tied=True),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", PAIRWISE, ids=str)
def test_other_schedules_meshes_and_models_give_the_same(case: Case):
    check(case)


def least(schedule: str, pipe: int) -> int:
    """Micro-batches that make all kinds of operations appear."""
    return 2 * pipe + 2 if schedule.startswith("dualpipe") else pipe + 1


def layers_for(schedule: str, pipe: int) -> int:
    """With head and embedding, and one more than stages need."""
    stages = 2 * pipe if schedule == "dualpipev" else pipe
    return max(3, stages - 2)


MATRIX = [
    Case(schedule, mesh, least(schedule, pipe), layers=layers_for(schedule, pipe))
    for schedule in NAMES
    for pipe, mesh in ((2, "2x2x2"), (2, "2x1x1"), (4, "4x1x2"), (8, "8x1x1"))
]
SPECIAL = [
    Case("dualpipe", "2x1x2", 4, "E+2|H+M", layers=2),
    Case("1f1b", "4x1x1", 5, layers=7),
    Case("dualpipe", "4x1x2", 8, layers=7),
    Case("zb1p", "8x1x1", 9, layers=17),
    Case("dualpipe", "8x1x1", 16, layers=17),
    Case("dualpipe", "2x1x4", 4, skewed=True),
    Case("dualpipe", "2x1x2", 4, data=2),
    Case("zb1p", "2x1x1", 3, data=4),
    Case("zb1p", "4x2x1", 5, skewed=True),
    Case("dualpipe", "4x1x1", 6, ramp=2),
    Case("dualpipe", "2x1x2", 4, isolate=True, rows=2),
    Case("zb1p", "2x2x2", 4, isolate=True, mtp=2),
    Case("dualpipe", "2x1x2", 4, tied=True),
    Case("1f1b", "4x1x1", 4, "E|3|H|M", tied=True),
    Case("dualpipe", "2x1x2", 4, mtp=0),
    Case("dualpipe", "2x1x2", 4, "E+3|H+M+M", mtp=2),
    Case("zb1p", "4x1x1", 4, "E+3|H|M|M", mtp=2),
    Case("dualpipe", "4x1x1", 8, "E+3|H|M|M", mtp=2, remat="full"),
    Case("dualpipe", "2x1x2", 4, remat="report"),
    Case("dualpipe", "2x1x2", 4, remat="full"),
    Case("zb1p", "2x1x2", 4, remat="full"),
]


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)  # 17 layers on 8 ranks take minutes to compile
@pytest.mark.parametrize("case", MATRIX + SPECIAL, ids=str)
def test_all_schedules_meshes_and_models_give_the_same(case: Case):
    found = check(case)
    if case.ramp > 1:
        assert found.schedule.name == "1f1b"
    else:
        assert found.schedule.name == case.schedule
    if case.skewed:
        rounds = found.outcome.metrics.traffic.most_rounds_L
        assert (rounds >= case.microbatches * case.devices / 2).all()


SINGLE = [
    pytest.param(Case("dualpipe", "2x1x1", 4, rows=2, dtype="float32"), marks=pytest.mark.slow),
    Case("dualpipe", "2x1x2", 4, rows=2, dtype="float32"),
    Case("zb1p", "4x1x1", 4, rows=2, dtype="float32", remat="report"),
]


@pytest.mark.parametrize(
    "case",
    [
        SINGLE[0],
        *(pytest.param(case, marks=pytest.mark.exhaustive) for case in SINGLE[1:]),
    ],
    ids=str,
)
def test_it_is_the_same_in_float32(case: Case):
    """On inputs whose choice of experts no rounding can change."""
    assert margin_of(case) > 1e-4
    check(case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("recipe", ["fp8", "fp8_pow2", "fp8_per_tensor", "fp8_square_gradients"])
@pytest.mark.parametrize("schedule", ["dualpipe", "zb1p"])
def test_products_in_fp8_are_those_of_one_device(recipe: str, schedule: str):
    """With one device on a rank blocks are those of the plain step's, micro-batch by micro-batch,
    and the order of sums alone differs.
    """
    check(Case(schedule, "2x1x1", 4, rows=2, dtype="float32", recipe=recipe))
