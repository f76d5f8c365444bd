"""Tensors by layer name: exact both ways, one name in every stacking, nothing lost in silence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.checkpoint.names import as_stored, from_layers, to_layers
from dsv3_jax.config import ModelConfig
from dsv3_jax.model.router import RouterBias
from dsv3_jax.quant.fp8 import Blocked, grid
from tests.shapes import random_model, tiny_model

DEEP = tiny_model(num_layers=5, num_dense_layers=2, mtp_depth=2)


def params_of(cfg: ModelConfig, dtype=jnp.float32) -> nnx.State:
    return nnx.split(random_model(cfg, dtype), nnx.Param, RouterBias)[1]


def biases_of(cfg: ModelConfig) -> nnx.State:
    return nnx.split(random_model(cfg), nnx.Param, RouterBias)[2]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dense", [0, 2, 5])
def test_names_and_back_keep_every_bit(dense: int, dtype):
    cfg = tiny_model(num_layers=5, num_dense_layers=dense)
    state = params_of(cfg, dtype)
    named = to_layers(state, dense)
    assert all(type(array) is np.ndarray and array.dtype == dtype for array in named.values())
    restored = from_layers(jax.eval_shape(lambda: state), named, dense)
    assert not named  # no array is held twice
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for new, old in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert new.dtype == old.dtype
        assert np.array_equal(new, old)


def test_layers_are_counted_from_the_first_of_the_model():
    state = params_of(DEEP)
    named = to_layers(state, 2)
    layers = {name.split(".")[1] for name in named if name.startswith("layers.")}
    assert layers == {"0", "1", "2", "3", "4"}
    for absolute, stack, index in (
        (1, "dense_layers", 1),
        (2, "moe_layers", 0),
        (4, "moe_layers", 2),
    ):
        weight = state[stack]["mla"]["w_o_HU_D"][...][index]
        assert np.array_equal(named[f"layers.{absolute}.mla.w_o_HU_D"], weight)
    assert "layers.1.dense.w_up_DF" in named
    assert "layers.1.moe.router.w_DE" not in named
    assert not any("layers.1.moe" in name or "layers.2.dense" in name for name in named)
    modules = {name.split(".")[1] for name in named if name.startswith("mtp.")}
    assert modules == {"0", "1"}
    assert {"embed_VD", "norm_D", "head_DV"} <= set(named)


def test_every_parameter_has_one_name():
    named = to_layers(params_of(DEEP), 2) | to_layers(biases_of(DEEP), 2)
    count = DEEP.param_count()
    assert sum(array.size for array in named.values()) == count.main + count.mtp


def test_router_biases_have_names_of_their_layers():
    named = to_layers(biases_of(DEEP), 2)
    routers = [f"layers.{i}.moe" for i in (2, 3, 4)] + [f"mtp.{k}.block.moe" for k in (0, 1)]
    assert list(map(len, named.values())) == [DEEP.num_experts] * 5
    assert sorted(name.removesuffix(".router.bias_E") for name in named) == sorted(routers)


def test_layers_restore_into_another_stack():
    """The first three layers of a model of five: MoE stacks of one layer and of three."""
    named = to_layers(params_of(DEEP), 2)
    first = {name: x for name, x in named.items() if not name.startswith(("layers.3", "layers.4"))}
    like = params_of(tiny_model(num_layers=3, num_dense_layers=2, mtp_depth=2))
    restored = from_layers(like, dict(first), 2)
    assert restored["moe_layers"]["mla"]["w_o_HU_D"].shape[0] == 1
    again = to_layers(restored, 2)
    assert again.keys() == first.keys()
    assert all(np.array_equal(again[name], array) for name, array in first.items())


def test_restored_values_take_the_dtype_that_is_asked_for():
    named = to_layers(params_of(DEEP), 2)
    halved = from_layers(params_of(DEEP, jnp.bfloat16), dict(named), 2)
    for new, name in ((halved["embed_VD"], "embed_VD"), (halved["norm_D"], "norm_D")):
        assert np.array_equal(new[...], named[name].astype(jnp.bfloat16))


def test_missing_left_over_and_misshapen_tensors_are_named():
    state = params_of(DEEP)
    named = to_layers(state, 2)
    lacking = {n: x for n, x in named.items() if n not in ("norm_D", "layers.3.mla.w_o_HU_D")}
    with pytest.raises(ValueError, match=r"lacks .* 2 in all: layers.3.mla.w_o_HU_D, norm_D$"):
        from_layers(state, lacking, 2)
    extra = named | {f"layers.{i}.x": named["norm_D"] for i in range(5, 12)}
    with pytest.raises(
        ValueError, match=r"holds .* 7 in all: layers.10.x, layers.11.x, .*, \.\.\.$"
    ):
        from_layers(state, extra, 2)
    turned = named | {"embed_VD": named["embed_VD"].T}
    with pytest.raises(ValueError, match=r"embed_VD has shape \(32, 64\); .* needs \(64, 32\)"):
        from_layers(state, turned, 2)


def test_another_split_of_dense_and_moe_layers_is_refused():
    with pytest.raises(ValueError, match=r"lacks tensors of this model.*layers.1.moe"):
        from_layers(
            params_of(tiny_model(num_layers=5, mtp_depth=2)), to_layers(params_of(DEEP), 2), 1
        )


def in_fp8(cfg: ModelConfig) -> nnx.State:
    """Parameters of which the experts' are in FP8."""

    def convert(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        if not str(path[-1]).endswith(("EDF", "EFD")):
            return variable
        draw = np.random.default_rng(len(str(path)))
        values = draw.standard_normal(variable.shape).astype(jnp.float8_e4m3fn)
        scales = 1 + draw.random(grid(variable.shape)).astype(np.float32)
        return variable.replace(Blocked(jnp.asarray(values), jnp.asarray(scales)))

    return nnx.map_state(convert, params_of(cfg))


def test_a_weight_in_fp8_is_two_arrays_and_comes_back():
    state = in_fp8(DEEP)
    named = to_layers(state, 2)
    assert named["layers.3.moe.w_up_EDF.values"].dtype == jnp.float8_e4m3fn
    assert named["mtp.1.block.moe.w_up_EDF.scales"].shape == (8, 1, 1)
    assert "layers.3.moe.w_up_EDF" not in named
    like = as_stored(jax.eval_shape(lambda: params_of(DEEP)), named, 2)
    restored = from_layers(like, named, 2)
    assert not named
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for new, old in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert new.dtype == old.dtype
        assert np.array_equal(new, old)


def test_a_weight_in_fp8_is_expanded_for_a_model_of_arrays():
    state = in_fp8(DEEP)
    restored = from_layers(params_of(DEEP), to_layers(state, 2), 2)
    up = ("moe", "w_up_EDF")
    for stack, path in (("moe_layers", up), ("mtp", (1, "block", *up))):
        new, old = restored[stack], state[stack]
        for key in path:
            new, old = new[key], old[key]
        assert new.dtype == jnp.float32
        assert np.array_equal(new[...], old[...].dequantize())


def test_scales_without_values_are_left_over():
    named = to_layers(in_fp8(DEEP), 2)
    del named["layers.3.moe.w_up_EDF.values"]
    with pytest.raises(ValueError, match=r"lacks tensors .* 1 in all: layers\.3\.moe\.w_up_EDF$"):
        from_layers(params_of(DEEP), named, 2)
