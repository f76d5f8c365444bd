"""The whole model: composition, causality by gradient, dtypes, variants, initial weights."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import transformer
from dsv3_jax.model.layers import Init
from dsv3_jax.model.router import RouterBias
from dsv3_jax.model.transformer import DeepSeekV3, positions
from dsv3_jax.model.yarn import rope_table
from tests.jaxprs import equations
from tests.shapes import TINY_YARN, compiled, normal, random_model, random_tokens, tiny_model
from tests.tolerances import FLOAT64, assert_close

B, T = 2, 6
CFG = tiny_model(num_layers=4, num_dense_layers=2)
VARIANTS = {
    "as released": {},
    "tied head, YaRN, no MTP": {"tied_head": True, "yarn": TINY_YARN, "mtp_depth": 0},
    "direct query, no dense layers": {"q_latent": None, "num_dense_layers": 0},
    "two MTP depths, no shared experts": {"mtp_depth": 2, "num_shared_experts": 0},
    "one group, routed indicator": {
        "num_groups": 1,
        "num_kept_groups": 1,
        "balance_indicator": "routed",
    },
    "dense layers only": {"num_dense_layers": 4, "mtp_depth": 0},
    "dense layers and MTP": {"num_dense_layers": 4},
}


def layers_of(stack) -> list:
    """The single layers of a stack."""
    count = len(jax.tree.leaves(stack)[0])
    return [jax.tree.map(lambda w, i=i: np.asarray(w)[i], stack) for i in range(count)]


def test_positions_count_from_the_start_of_each_segment():
    segments = jnp.array([[0, 0, 0, 1, 1, 2], [5, 5, 5, 5, 5, 5]], jnp.int32)
    expected = [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    np.testing.assert_array_equal(positions(segments, segments), expected)
    np.testing.assert_array_equal(positions(segments, None), [[0, 1, 2, 3, 4, 5]])


def test_the_model_is_embedding_layers_in_order_norm_and_head(x64, strict_dtypes):
    model, tokens = random_model(CFG, jnp.float64), random_tokens(CFG, B, T)
    valid = np.ones((B, T), bool)
    valid[0, 4:] = False
    layer = compiled(
        lambda block, x: block(x, rope_table(CFG, jnp.arange(T)[None], x.dtype), valid)
    )
    x, collected = np.asarray(model.embed_VD[...])[tokens], []
    for block in layers_of(model.dense_layers) + layers_of(model.moe_layers):
        x, stats = layer(block, x)
        collected += [] if stats is None else [stats]
    x = np.asarray(x)
    rms = np.sqrt((x**2).mean(-1, keepdims=True) + CFG.rms_eps)
    expected = x / rms * np.asarray(model.norm_D[...]) @ np.asarray(model.head_DV[...])

    @compiled
    def whole(model):
        h, stats = model.hidden(tokens, valid)
        return model.logits(h), model(tokens), stats

    logits, called, stats = whole(model)
    assert_close((logits, called), (expected, expected), FLOAT64)
    stacked = jax.tree.map(lambda *parts: np.stack(parts), *collected)
    assert_close(stats, stacked, FLOAT64)
    counted = np.sum(valid) * CFG.experts_per_token
    np.testing.assert_array_equal(stats.load_E.sum(-1), [counted] * CFG.num_moe_layers)


def test_no_logit_depends_on_a_later_token_and_every_one_on_all_before(x64):
    """By gradient through dense and MoE layers; each position has an embedding row of its own."""
    cfg = tiny_model(num_layers=2, mtp_depth=0)
    model, tokens = random_model(cfg, jnp.float64), jnp.arange(T)[None]
    weight = normal(3, cfg.vocab_size)

    def run(embed_VD):
        varied = jax.tree.map(lambda x: x, model)  # a copy of this trace
        varied.embed_VD = varied.embed_VD.replace(embed_VD)
        return varied(tokens)[0] @ weight

    jacobian_TVD = np.asarray(compiled(jax.jacrev(run))(model.embed_VD[...]))
    reach_TS = np.abs(jacobian_TVD[:, :T]).max(-1) > 0
    np.testing.assert_array_equal(reach_TS, np.tri(T, dtype=bool))


def trace(cfg: ModelConfig, weights, activations):
    """Abstract logits, MTP hidden states, and gradients of all weights; nothing runs."""
    model = jax.eval_shape(lambda: random_model(cfg, weights))
    graphdef, params, biases = nnx.split(model, nnx.Param, RouterBias)
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def run(params, biases, tokens):
        model = nnx.merge(graphdef, params, biases)
        h, stats = model.hidden(tokens, None, activations)
        logits = model.logits(h)
        deeper = [h_k for h_k, _ in model.mtp_hidden(h, tokens)]
        total = logits.sum() + sum(h_k.astype(logits.dtype).sum() for h_k in deeper)
        return total + stats.balance.sum(), (logits, h, deeper, stats)

    return jax.eval_shape(jax.grad(run, has_aux=True), params, biases, tokens)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_runs_in_float64_without_implicit_casts(x64, strict_dtypes, changes: dict):
    check_dtypes(replace(CFG, **changes), "float64", None, "float64")


@pytest.mark.parametrize(
    ("weights", "activations"),
    [("float32", "bfloat16"), ("bfloat16", None)],
)
def test_logits_and_statistics_are_float32_in_lower_precisions(
    strict_dtypes, weights: str, activations: str | None
):
    check_dtypes(CFG, weights, activations, "float32")


def check_dtypes(cfg: ModelConfig, weights: str, activations: str | None, logits: str) -> None:
    """Hidden states have the activations' dtype, gradients the weights', all else is `logits`."""
    grads, (made, h, deeper, stats) = trace(cfg, jnp.dtype(weights), activations)
    assert (made.shape, made.dtype) == ((B, T, cfg.vocab_size), logits)
    assert len(deeper) == cfg.mtp_depth
    assert {x.dtype for x in (h, *deeper)} == {jnp.dtype(activations or weights)}
    assert (stats.load_E.shape, stats.load_E.dtype) == ((cfg.num_moe_layers, 8), jnp.int32)
    assert (stats.balance.shape, stats.balance.dtype) == ((cfg.num_moe_layers,), logits)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(weights)}


def test_a_tied_head_is_the_embedding(x64):
    cfg = tiny_model(num_layers=1, num_dense_layers=1, mtp_depth=0, tied_head=True)
    model, h = random_model(cfg, jnp.float64), normal(0, B, T, cfg.d_model)
    assert not hasattr(model, "head_DV")
    expected = np.asarray(h) @ np.asarray(model.embed_VD[...]).T
    assert_close(compiled(model.logits)(h), expected, FLOAT64)


def test_rows_longer_than_the_model_are_refused():
    model = jax.eval_shape(lambda: random_model(CFG))
    with pytest.raises(
        ValueError, match=r"65 tokens in a row; allowed: at most model.max_length = 64"
    ):
        model.hidden(jnp.zeros((1, 65), jnp.int32))


@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.exhaustive), "report"])
def test_layers_written_out_compute_what_scanned_ones_do(x64, monkeypatch, remat: str):
    """Hidden states and gradients."""
    model, tokens = random_model(CFG, jnp.float64), random_tokens(CFG, B, T)

    def run(model, tokens):
        h, pull = jax.vjp(lambda m: m.hidden(tokens, None, None, remat)[0], model)
        return h, pull(jnp.cos(h))

    written_out = compiled(run)(model, tokens)
    monkeypatch.setattr(transformer, "UNROLLED", 0)
    assert_close(written_out, compiled(lambda m, t: run(m, t))(model, tokens), FLOAT64)


@pytest.mark.parametrize("scanned", [False, True], ids=["written out", "scanned"])
@pytest.mark.parametrize("remat", ["report", "full"])
def test_layers_and_mtp_modules_are_rematerialised_as_asked(monkeypatch, remat: str, scanned):
    """One checkpoint in the body of each of the two scans, one around each MTP module."""
    if scanned:
        monkeypatch.setattr(transformer, "UNROLLED", 0)
    model, tokens = random_model(CFG), random_tokens(CFG, B, T)

    def run(tokens):
        h, _ = model.hidden(tokens, None, None, remat)
        return model.mtp_hidden(h, tokens, None, remat)

    checkpoints = [
        e for e in equations(run, tokens) if e.primitive.name in ("checkpoint", "remat2", "remat")
    ]
    assert all((e.params["policy"] is None) == (remat == "full") for e in checkpoints)
    # The compiler may not merge forward pass and recomputation; it cannot across two scans.
    expected = [False, False, True] if scanned else [True, True, True]
    assert [e.params["prevent_cse"] for e in checkpoints] == expected


@pytest.fixture
def keys_for_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each weight is the key it would be drawn with: what is equal here is equal when drawn."""

    def normal(self: Init, name: str, *shape: int) -> nnx.Param:
        return nnx.Param(jax.random.key_data(self.at(name).key))

    monkeypatch.setattr(Init, "normal", normal)


def keys_by_layer(cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Key of every weight by path, layers by their absolute index."""
    model = DeepSeekV3(cfg, rngs=nnx.Rngs(0))
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name, key = ".".join(map(str, path)), np.asarray(variable[...])
        if not name.endswith(("norm_D", "norm_Q", "norm_C")):
            stack, _, rest = name.partition(".")
            first = {"dense_layers": 0, "moe_layers": cfg.num_dense_layers}.get(stack)
            if first is None:
                found[name] = key
            else:
                found |= {f"layer{first + i}.{rest}": each for i, each in enumerate(key)}
    return found


def test_a_weight_is_drawn_by_absolute_layer_whatever_the_stacks_and_the_depth(keys_for_weights):
    small = keys_by_layer(tiny_model(num_layers=3, num_dense_layers=1))
    large = keys_by_layer(tiny_model(num_layers=5, num_dense_layers=3, mtp_depth=2))
    assert "layer2.mla.w_o_HU_D" in small  # an expert layer there, a dense one here
    assert set(small) - set(large) == {
        n for n in small if n.startswith(("layer1.moe", "layer2.moe"))
    }
    for name in set(small) & set(large):
        np.testing.assert_array_equal(small[name], large[name], err_msg=name)


def test_no_two_weights_are_drawn_with_one_key(keys_for_weights):
    keys = keys_by_layer(tiny_model(num_layers=4, num_dense_layers=2, mtp_depth=2))
    assert len({tuple(key) for key in keys.values()}) == len(keys)


def test_initial_weights_have_the_configured_deviation_gains_one_and_biases_zero():
    cfg = tiny_model(num_layers=2, mtp_depth=0, init_std=0.006)

    @compiled
    def build(key):
        model = DeepSeekV3(cfg, rngs=nnx.Rngs(key))
        moe = model.moe_layers.moe  # what is not returned is not drawn
        return (model.embed_VD[...], moe.w_up_EDF[...]), model.norm_D[...], moe.router.bias_E[...]

    weights, gain, bias = build(jax.random.key(0))
    for w in weights:
        # Sampling error of a deviation: std / sqrt(2 n); four of them.
        assert abs(np.std(w) - 0.006) < 4 * 0.006 / np.sqrt(2 * w.size)
    np.testing.assert_array_equal(gain, np.ones(cfg.d_model))
    np.testing.assert_array_equal(bias, np.zeros((1, cfg.num_experts)))
