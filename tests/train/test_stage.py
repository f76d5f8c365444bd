"""What a stage's programs hold, told from their lowered form: where products of weights' gradients
are, which collectives there are, what is kept from forward to backward. Nothing runs here.
"""

import math
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.model.precision import is_linear
from dsv3_jax.parallel.mesh import EXPERT_AXES, is_stacked, weight_spec
from dsv3_jax.plan.kept import Kept
from dsv3_jax.plan.lowered import device_bytes
from dsv3_jax.train.pipeline_programs import PassPrograms
from tests.train.lowered import count, operations, result_shape, result_size
from tests.train.pipelines import Case, pipeline_of

# A dense layer and two with experts; and one with experts, the head and an MTP module. On rank 0 of
# dualpipe chunk 0 is the first stage and chunk 1 the second. Sizes of nearly all activations have a
# factor of 13, and no weight's has.
ALONE = Case(
    "dualpipe",
    "2x1x1",
    4,
    "E+3|1+H+M",
    layers=4,
    dtype="bfloat16",
    kv_latent=18,
    experts=20,
    length=13,
)
SPREAD = replace(ALONE, mesh="2x1x2", stages="E+2|H+M", layers=2)
SHARED = replace(SPREAD, sequence="local", length=60)  # 30 tokens of a row on each device
KINDS = [
    ALONE,
    *[
        pytest.param(replace(case, recipe=recipe, remat=remat), marks=pytest.mark.slow)
        for case, recipe, remat in (
            (ALONE, "fp8", "none"),
            (ALONE, "fp8", "report"),
            (SPREAD, "dtype", "report"),
            (SPREAD, "fp8", "none"),
            (SHARED, "dtype", "none"),
            (SHARED, "fp8", "report"),
        )
    ],
]
CHUNKS = (0, 1)

# Products of one layer with linears: in attention (queries; latent; keys and values; output), in a
# feed-forward network (gate and up side by side; down).
ATTENTION, FEED_FORWARD = 4, 2
PROJECTION = 1  # of an MTP module: embedding and stream side by side


@cache
def passes(case: Case) -> PassPrograms:
    return pipeline_of(case).passes[0]


@cache
def lowered(case: Case, letter: str, chunk: int) -> Any:
    return passes(case).trace([(letter, chunk)])[letter, chunk]


@cache
def text(case: Case, letter: str, chunk: int) -> str:
    return lowered(case, letter, chunk).as_text()


def gemms(case: Case, letter: str, chunk: int) -> int:
    return count(text(case, letter, chunk), "dot_general")


def weight_shapes(case: Case, chunk: int) -> dict[str, tuple[int, ...]]:
    """Of one layer, on one device."""
    stage = passes(case).programs.chunks[chunk].stage
    found = {}
    for name, x in zip(stage.names, jax.tree.leaves(stage.params), strict=True):
        shape = list(x.shape[is_stacked(name) :])
        if EXPERT_AXES in weight_spec(name):
            shape[0] //= case.devices
        found[name] = tuple(shape)
    return found


def test_a_weights_gradient_is_one_product_of_each_linear_and_in_w():
    """Weights side by side are one; and so is a stack of layers. That of experts is followed by
    one that sums over each expert's blocks.
    """
    dense = ATTENTION + FEED_FORWARD
    mixture = ATTENTION + FEED_FORWARD + 2 * FEED_FORWARD  # a shared expert, and the others
    assert gemms(ALONE, "W", 0) == dense + mixture
    assert gemms(ALONE, "W", 1) == mixture + PROJECTION + mixture


def test_b_has_the_products_of_inputs_gradients_alone():
    """Layer by layer: one of each linear, six of attention's inside (scores once more; gradients of
    probabilities, queries, keys, values; the sum that softmax's derivative subtracts), and of a
    router that of its input and that of its weight, which is no linear's.
    """
    inside, router = 6, 2
    dense = ATTENTION + inside + FEED_FORWARD
    mixture = ATTENTION + inside + 2 * FEED_FORWARD + router
    assert gemms(ALONE, "b", 0) == dense + 2 * mixture
    assert gemms(ALONE, "b", 1) == mixture + PROJECTION + mixture


@pytest.mark.parametrize("chunk", CHUNKS)
def test_no_product_of_b_has_a_weights_shape_and_every_one_of_w_has(chunk: int):
    shapes = weight_shapes(ALONE, chunk)
    linears = {shape for name, shape in shapes.items() if is_linear(name)}
    matrices = {shape[-2:] for shape in linears} | joined(linears)
    for product in operations(text(ALONE, "b", chunk), "dot_general"):
        assert result_shape(product)[-2:] not in matrices
    for product in operations(text(ALONE, "W", chunk), "dot_general"):
        assert {result_shape(product)[-2:], result_shape(product)[:-3:-1]} & matrices


def joined(shapes: set[tuple[int, ...]]) -> set[tuple[int, int]]:
    """Shapes of gates and ups side by side."""
    return {(shape[-2], 2 * shape[-1]) for shape in shapes if shape[-2] == 32}


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_a_plan_knows_what_is_kept(case: Case, chunk: int):
    """But for flags and places: up to an eighth beside rows of 32 numbers, and below 0.2 % at V3's
    width, which `plan/test_compile.py` holds.
    """
    kept, cut = Kept(case.config), passes(case).programs.chunks[chunk].stage.cut
    residuals = device_bytes(lowered(case, "F", chunk).out_info[1])
    assert sum(kept.residuals(cut).values()) == pytest.approx(residuals, rel=0.125)
    tape = device_bytes(lowered(case, "b", chunk).out_info[2])
    assert kept.tape(cut) == pytest.approx(tape, rel=0.02)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_b_and_w_are_together_b_in_one_program(chunk: int):
    assert gemms(ALONE, "B", chunk) == gemms(ALONE, "b", chunk) + gemms(ALONE, "W", chunk)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_fb_is_one_program_with_what_f_and_b_of_the_two_directions_have(chunk: int):
    """All their exchanges and all their products."""
    both, forward, backward = (
        text(SPREAD, letter, c) for letter, c in (("FB", chunk), ("F", chunk), ("B", 1 - chunk))
    )
    for name in ("all_to_all", "dot_general"):
        counts = [count(part, name) for part in (forward, backward)]
        assert all(counts)
        assert count(both, name) == sum(counts)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_no_collective_is_over_weights(chunk: int):
    """Only the exchange of experts, and numbers about it: how many rounds it takes, and how much
    has come. W has none at all.
    """
    weights = {math.prod(shape) for shape in weight_shapes(SPREAD, chunk).values()}
    assert count(text(SPREAD, "W", chunk), "(all_|reduce_|collective_)[a-z_]+") == 0
    for letter in ("F", "B", "FB"):
        program = text(SPREAD, letter, chunk)
        assert count(program, "all_gather") == count(program, "collective_[a-z]+") == 0
        for name in ("all_reduce", "reduce_scatter"):
            for found in operations(program, name):
                assert result_size(found) == 1
                assert "i32>" in found.rpartition("->")[2]
        assert all(result_size(x) not in weights for x in operations(program, "all_to_all"))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_nothing_kept_has_a_weights_size(case: Case, chunk: int):
    """Of one layer or of a stack, of one weight or of two side by side, of one expert or of all."""
    shapes = weight_shapes(case, chunk)
    stacks = {1, len(passes(case).programs.chunks[chunk].stage.cut.layers(1, case.layers)) or 1}
    sizes = {count * math.prod(shape) for shape in shapes.values() for count in stacks}
    tails = {shape[-2:] for shape in shapes.values() if len(shape) > 1}
    tails |= joined({shape for shape in shapes.values() if len(shape) > 1})
    _, residuals, _, _ = lowered(case, "F", chunk).out_info
    assert len(residuals) > 20
    for x in (x for x in residuals if x.dtype != jnp.int32):
        of_device = x.shape[1:]
        assert math.prod(of_device) not in sizes, (x.shape, x.dtype)
        assert of_device[-2:] not in tails, (x.shape, x.dtype)
        assert of_device[:-3:-1] not in tails, (x.shape, x.dtype)
