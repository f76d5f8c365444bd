"""One attention layer on devices that share their rows, against an oracle on one device that does
by hand what each of them does: the same products with the same blocks, FP8 among them.
"""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import MeshConfig, QuantConfig
from dsv3_jax.model import blockwise
from dsv3_jax.model.attention import masked_attention
from dsv3_jax.model.mla import MLA, expanded
from dsv3_jax.model.yarn import rope_table, softmax_scale
from dsv3_jax.parallel.mesh import TOKEN_AXES, make_mesh, varying
from dsv3_jax.parallel.sequence import RowPlaces, RowShards
from dsv3_jax.quant.gemm import linear
from dsv3_jax.quant.recipes import recipe_of
from dsv3_jax.train.quantized_weights import with_quantized_weights
from tests.jaxprs import equations
from tests.shapes import compiled, normal, random_part, tiny_model
from tests.tolerances import FLOAT32, FLOAT64, assert_close

B, T = 2, 16
CFG = tiny_model(num_layers=1, mtp_depth=0)


def layer(dtype) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(random_part(MLA, CFG, dtype))


def inputs(dtype, isolate: bool):
    """Input, cotangent, segments."""
    segments = jnp.asarray([[0] * 5 + [1] * 11, [0] * 9 + [1] + [2] * 6], jnp.int32)
    x_BTD, dy_BTD = (normal(seed, B, T, CFG.d_model, dtype=dtype) for seed in (1, 2))
    return x_BTD, dy_BTD, segments if isolate else None


def computed(params: nnx.State, recipe) -> nnx.State:
    """Parameters as linears take them; their names here lack the layer's."""
    return with_quantized_weights({"mla": params}, recipe)["mla"] if recipe else params


def sharing(dtype, recipe, shards: int):
    """The program of a mesh: of parameters and `inputs` gradients and output."""
    graphdef, _ = layer(dtype)
    mesh, rows = make_mesh(MeshConfig(1, 1, 1, shards)), RowShards(("local",), shards)

    def body(params, x_BTD, dy_BTD, segments_BT):
        rope_BTR = rope_table(CFG, rows.places(T // shards)[None], x_BTD.dtype)
        params = varying(params, TOKEN_AXES)
        x_BTD, dy_BTD, segments_BT = varying(
            jax.tree.map(rows.own, (x_BTD, dy_BTD, segments_BT)), TOKEN_AXES
        )

        def of(params, x_BTD):
            attention = nnx.merge(graphdef, computed(params, recipe))
            return attention(x_BTD, rope_BTR, segments_BT, rows)

        y_BTD, pull = jax.vjp(of, params, x_BTD)
        dparams, dx_BTD = pull(dy_BTD)
        whole = rows.whole(y_BTD), rows.whole(dx_BTD)
        return lax.psum(dparams, TOKEN_AXES), *(lax.pmax(x, TOKEN_AXES) for x in whole)

    return jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P())


def shared(dtype, recipe, shards: int, isolate: bool):
    """Gradients and output on a mesh."""
    return compiled(sharing(dtype, recipe, shards))(layer(dtype)[1], *inputs(dtype, isolate))


def by_hand(dtype, recipe, shards: int, isolate: bool):
    """The same on one device, device by device and block by block."""
    graphdef, params = layer(dtype)
    x_BTD, dy_BTD, segments_BT = inputs(dtype, isolate)
    places = RowPlaces(shards, shards)
    own = [jnp.asarray(places.part(jnp.arange(T)[None], i)[0]) for i in range(shards)]
    rope_BTR = rope_table(CFG, jnp.arange(T, dtype=jnp.int32)[None], dtype)

    def of(params, x_BTD):
        attention = nnx.merge(graphdef, computed(params, recipe))
        c_kv, k_rope = (jnp.zeros((B, T, w), dtype) for w in (CFG.kv_latent, CFG.rope_dim))
        for place in own:
            parts = attention.latents(x_BTD[:, place], rope_BTR[:, place])
            c_kv, k_rope = c_kv.at[:, place].set(parts[0]), k_rope.at[:, place].set(parts[1])
        y_BTD = jnp.zeros_like(x_BTD)
        for place in own:
            q = jnp.concatenate(attention._queries(x_BTD[:, place], rope_BTR[:, place]), -1)
            weight = attention.w_ukv_C_HNU[...]
            size = min(blockwise.BLOCK, T // shards // 2)
            blocks = [slice(start, start + size) for start in range(0, T, size)]
            keys = [expanded(CFG, c_kv[:, s], k_rope[:, s], weight) for s in blocks]
            k, v = (jnp.concatenate(x, 1) for x in zip(*keys, strict=True))
            seen = (jnp.arange(T)[None] <= place[:, None])[None]
            if isolate:
                seen = seen & (segments_BT[:, place, None] == segments_BT[:, None])
            o = masked_attention(q, k, v, softmax_scale(CFG), seen)
            y = linear(o.reshape(B, len(place), -1), attention.w_o_HU_D[...])
            y_BTD = y_BTD.at[:, place].set(y)
        return y_BTD

    def run(params, x_BTD, dy_BTD):
        y_BTD, pull = jax.vjp(of, params, x_BTD)
        return pull(dy_BTD)[0], y_BTD, pull(dy_BTD)[1]

    return compiled(run)(params, x_BTD, dy_BTD)


@pytest.mark.parametrize(
    ("shards", "isolate"),
    [(2, False), (4, True), pytest.param(8, True, marks=pytest.mark.exhaustive)],
)
def test_shared_rows_are_attended_to_as_by_one_device(x64, monkeypatch, shards, isolate):
    monkeypatch.setattr(blockwise, "BLOCK", 2)
    case = jnp.float64, None, shards, isolate
    assert_close(jax.device_get(shared(*case)), jax.device_get(by_hand(*case)), FLOAT64)


@pytest.mark.parametrize("shards", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_fp8_products_of_shared_rows_have_the_same_blocks(monkeypatch, shards: int):
    """Gradients of keys and values are rounded on each device, before they are summed."""
    monkeypatch.setattr(blockwise, "BLOCK", 4)
    case = jnp.float32, recipe_of(QuantConfig("fp8")), shards, True
    assert_close(jax.device_get(shared(*case)), jax.device_get(by_hand(*case)), FLOAT32)


def test_gradients_of_latents_are_summed_in_float32():
    """Those of several devices, whatever the activations are."""
    dtype = jnp.bfloat16
    found = equations(sharing(dtype, None, 2), layer(dtype)[1], *inputs(dtype, False))
    sums = [e.invars[0].aval for e in found if e.primitive.name == "reduce_scatter"]
    assert [(x.dtype, x.shape[-1]) for x in sums] == [
        (jnp.float32, CFG.kv_latent),
        (jnp.float32, CFG.rope_dim),
    ]
