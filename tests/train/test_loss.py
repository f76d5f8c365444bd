"""The loss against loops over tokens and depths (report Eq. 17, 21-25), in float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import TrainConfig
from dsv3_jax.data.loader import Batch
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.model.yarn import rope_table
from dsv3_jax.train.loss import loss
from tests.shapes import TINY_YARN, compiled, normal, random_model, random_tokens, tiny_model
from tests.tolerances import FLOAT64, assert_close

B, T = 2, 7
TRAIN = TrainConfig(dtype="float64", balance_weight=1e-4)
CFG = tiny_model(num_layers=1, num_dense_layers=1, mtp_depth=2)

run_block = compiled(lambda block, *args: block(*args)[0])


def batch_of(sequence: jax.Array) -> Batch:
    """Tokens and labels of rows t_1 .. t_{T+1}."""
    return Batch(sequence[:, :-1], sequence[:, 1:])


def nll(logits_V: np.ndarray, label: int) -> float:
    """-log softmax(logits)[label]."""
    exp = np.exp(logits_V - logits_V.max())
    return -np.log(exp[label] / exp.sum())


def norm(x: np.ndarray, gain: jax.Array) -> np.ndarray:
    return x / np.sqrt((x**2).mean() + CFG.rms_eps) * np.asarray(gain[...])


def mtp_loss_by_equations(
    model: DeepSeekV3, t: np.ndarray, h: np.ndarray, weight_T: np.ndarray
) -> float:
    """1/D sum_k L^k of one row t_1 .. t_{T+1} (0-based here), one token at a time; `weight_T` of
    t_2 .. t_{T+1}.

    TRM_k runs on T - k positions; nothing exists beyond them.
    """
    embedding, head = np.asarray(model.embed_VD[...]), np.asarray(model.head_DV[...])
    depths, total = len(model.mtp), 0.0
    for k, module in enumerate(model.mtp, start=1):
        count = len(t) - 1 - k
        joined = [
            np.concatenate(
                [norm(embedding[t[i + k]], module.embed_norm_D), norm(h[i], module.hidden_norm_D)]
            )
            for i in range(count)
        ]
        x = np.array(joined) @ np.asarray(module.w_proj_DD_D[...])
        rope = rope_table(CFG, jnp.arange(count)[None], x.dtype)
        y = np.asarray(run_block(module.block, x[None], rope, np.ones((1, count), bool))[0])
        h = np.stack([norm(y[i], module.norm_D) for i in range(count)])
        nats = [weight_T[i + k] * nll(h[i] @ head, t[i + k + 1]) for i in range(count)]
        total += sum(nats) / (len(t) - 1)
    return total / depths


@pytest.mark.parametrize(("depth", "weighted"), [(1, False), (2, True)])
def test_main_and_mtp_loss_equal_a_loop_over_tokens(x64, depth: int, weighted: bool):
    """Normalised by T for every depth, although depth k has T - k terms; a label's weight goes
    with it.
    """
    model = random_model(replace(CFG, mtp_depth=depth), jnp.float64)
    sequence = np.asarray(random_tokens(CFG, B, T + 1))
    weight_BT = np.asarray(normal(1, B, T)) if weighted else np.ones((B, T))
    batch = batch_of(jnp.asarray(sequence))
    batch = batch._replace(weights_BT=jnp.asarray(weight_BT) if weighted else None)

    @compiled
    def run(model):
        return *loss(model, batch, B * T, 0.3, TRAIN), model.hidden(batch[0])[0]

    total, parts, hidden = run(model)
    hidden = np.asarray(hidden)
    head = np.asarray(model.head_DV[...])
    main = [
        weight_BT[b, t] * nll(hidden[b, t] @ head, sequence[b, t + 1]) for b, t in np.ndindex(B, T)
    ]
    mtp = [mtp_loss_by_equations(model, sequence[b], hidden[b], weight_BT[b]) for b in range(B)]
    assert_close(parts.main, np.mean(main), FLOAT64)
    assert_close(parts.mtp, np.mean(mtp), FLOAT64)
    assert_close(total, parts.main + 0.3 * parts.mtp + 1e-4 * parts.balance, FLOAT64)


def test_labels_of_minus_one_count_neither_in_the_loss_nor_in_the_load(x64):
    """Depth k leaves out a position if its own label or the one k further does not count."""
    model, sequence = random_model(CFG, jnp.float64), random_tokens(CFG, B, T + 1)
    tokens, labels, *_ = batch_of(np.array(sequence))
    labels[0, 4:] = labels[1, 2] = -1

    @compiled
    def run(model):
        _, parts = loss(model, Batch(tokens, jnp.asarray(labels)), 10, 0.3, TRAIN)
        h, _ = model.hidden(tokens)
        states = [h, *(h_k for h_k, _ in model.mtp_hidden(h, tokens))]
        return parts, jnp.stack([jax.nn.log_softmax(model.logits(h)) for h in states])

    parts, log_p = run(model)
    nlls, counts = np.zeros(3), np.zeros(3, int)
    for k, b, i in np.ndindex(3, B, T):
        if i + k < T and labels[b, i] >= 0 and labels[b, i + k] >= 0:
            nlls[k] -= log_p[k, b, i, labels[b, i + k]]
            counts[k] += 1
    assert_close(parts.main, nlls[0] / 10, FLOAT64)
    assert_close(parts.mtp, (nlls[1] + nlls[2]) / 2 / 10, FLOAT64)
    np.testing.assert_array_equal(parts.load_LE.sum(-1), counts[1:] * CFG.experts_per_token)


def test_balance_loss_is_alpha_per_layer_at_uniform_load(x64):
    """Routers without weights score all experts alike: two MoE layers and one MTP module."""
    cfg = tiny_model(num_layers=2, num_dense_layers=0)
    model, batch = random_model(cfg, jnp.float64), batch_of(random_tokens(cfg, B, T + 1))
    routers = [model.moe_layers.moe.router, *(module.block.moe.router for module in model.mtp)]
    for router in routers:
        router.w_DE = router.w_DE.replace(jnp.zeros_like(router.w_DE[...]))
    total, parts = compiled(lambda m: loss(m, batch, B * T, 0.0, TRAIN))(model)
    assert_close(parts.balance, np.float64(3), FLOAT64)
    np.testing.assert_allclose(total - parts.main, 3e-4, rtol=1e-9)


def test_mtp_and_balance_are_zero_where_the_model_has_neither(x64):
    cfg = tiny_model(num_layers=1, num_dense_layers=1, mtp_depth=0)
    model, batch = random_model(cfg, jnp.float64), batch_of(random_tokens(cfg, B, T + 1))
    total, parts = compiled(lambda m: loss(m, batch, B * T, 0.3, TRAIN))(model)
    assert (parts.mtp, parts.balance) == (0, 0)
    assert parts.load_LE.shape == (0, cfg.num_experts)
    assert total == parts.main > 0


def test_documents_of_an_isolated_row_learn_as_if_each_had_a_row_of_its_own(x64, strict_dtypes):
    """Two documents in one row of 7 tokens, and in two rows filled up; YaRN is on."""
    cfg = replace(CFG, yarn=TINY_YARN, num_layers=2)  # a dense and an expert layer
    model = random_model(cfg, jnp.float64)
    first, second = (random_tokens(cfg, 1, n, seed=n) for n in (4, 3))
    ends = jnp.full((1, 1), -1, jnp.int32)
    one_row = Batch(
        jnp.concatenate([first, second], 1),
        jnp.concatenate([first[:, 1:], ends, second[:, 1:], ends], 1),
        jnp.array([[0, 0, 0, 0, 1, 1, 1]], jnp.int32),
    )

    def filled(tokens: jax.Array, fill: int) -> jax.Array:
        return jnp.pad(tokens, ((0, 0), (0, 7 - tokens.shape[1])), constant_values=fill)

    two_rows = Batch(
        jnp.concatenate([filled(first, 0), filled(second, 0)]),
        jnp.concatenate([filled(x[:, 1:], -1) for x in (first, second)]),
    )

    def value_of(batch: Batch) -> tuple:
        def run(model):
            total, parts = loss(model, batch, 5, 0.3, replace(TRAIN, balance_weight=0.0))
            return total, parts._replace(balance=0.0)  # a mean over rows, whose number differs

        return compiled(run)(model)

    (total, parts), (other, same) = value_of(one_row), value_of(two_rows)
    assert_close(total, other, FLOAT64)
    assert_close(parts, same, FLOAT64)
    assert parts.main > 0
    assert parts.mtp > 0
