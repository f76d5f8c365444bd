"""Cross-entropy in chunks of tokens: no float32 logits of the whole batch; and its plain twin.

The gradient is taken in the forward pass, while a chunk's logits are there: nothing is computed
twice, and what stays for the backward pass are the gradients themselves, to be scaled by the
loss's cotangent.
"""

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.parallel.mesh import varying_like
from dsv3_jax.quant.wide import wide, wide_einsum

# Eight cost 4% of a step on CPUs at bench_cpu: the head is packed anew for each.
NUM_CHUNKS = 4


def plain_cross_entropy(
    h_BTD: jax.Array,
    head_DV: jax.Array,
    labels_BT: jax.Array,
    weights_BT: jax.Array | None = None,
) -> jax.Array:
    """Sum of -log p(label) over labels >= 0, in nats, each times its weight if there are weights;
    logits of the whole batch at once.
    """
    logits_BTV = wide_einsum("btd,dv->btv", h_BTD, head_DV.astype(h_BTD.dtype))
    log_p_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
    nll_BT = -jnp.take_along_axis(log_p_BTV, jnp.maximum(labels_BT, 0)[..., None], -1)[..., 0]
    nll_BT = jnp.where(labels_BT >= 0, nll_BT, 0)
    return (nll_BT if weights_BT is None else nll_BT * weights_BT.astype(nll_BT.dtype)).sum()


@jax.custom_vjp
def cross_entropy(
    h_BTD: jax.Array,
    head_DV: jax.Array,
    labels_BT: jax.Array,
    weights_BT: jax.Array | None = None,
) -> jax.Array:
    """`plain_cross_entropy` in `NUM_CHUNKS` chunks of tokens; no gradient goes to weights.

    labels int32, -1 = not counted. -> scalar, at least float32.
    """
    chunks = _chunks(h_BTD, labels_BT, weights_BT)
    head = head_DV.astype(h_BTD.dtype)

    def body(total, chunk):
        h_XD, labels_X, weights_X = chunk
        return total + _weighted(_nll(h_XD, head, labels_X)[0], weights_X).sum(), None

    start = varying_like(jnp.zeros((), wide(h_BTD.dtype)), h_BTD, head_DV)
    return lax.scan(body, start, chunks)[0]


def log_probs(h_BTD: jax.Array, head_DV: jax.Array, labels_BT: jax.Array) -> jax.Array:
    """log p of each label, 0 where it is -1; [B, T], at least float32. In chunks, too."""
    h_MXD, labels_MX, _ = _chunks(h_BTD, labels_BT, None)
    head = head_DV.astype(h_BTD.dtype)
    nll_MX = lax.map(lambda chunk: _nll(chunk[0], head, chunk[1])[0], (h_MXD, labels_MX))
    return -nll_MX.reshape(-1)[: labels_BT.size].reshape(labels_BT.shape)


def _forward(h_BTD, head_DV, labels_BT, weights_BT):
    chunks = _chunks(h_BTD, labels_BT, weights_BT)
    head = head_DV.astype(h_BTD.dtype)

    def body(carry, chunk):
        total, dhead_DV = carry
        h_XD, labels_X, weights_X = chunk
        nll_X, p_XV = _nll(h_XD, head, labels_X)
        onehot_XV = jax.nn.one_hot(labels_X, head.shape[1], dtype=p_XV.dtype)
        dlogits_XV = jnp.where(labels_X[:, None] >= 0, p_XV - onehot_XV, 0)
        dlogits_XV = _weighted(dlogits_XV, weights_X).astype(h_XD.dtype)
        dh_XD = wide_einsum("xv,dv->xd", dlogits_XV, head).astype(h_XD.dtype)
        dhead_DV += wide_einsum("xd,xv->dv", h_XD, dlogits_XV)
        return (total + _weighted(nll_X, weights_X).sum(), dhead_DV), dh_XD

    high = wide(h_BTD.dtype)
    start = (jnp.zeros((), high), jnp.zeros(head_DV.shape, high))
    start = varying_like(start, h_BTD, head_DV)
    (total, dhead_DV), dh_MXD = lax.scan(body, start, chunks)
    dh_BTD = dh_MXD.reshape(-1, h_BTD.shape[-1])[: labels_BT.size].reshape(h_BTD.shape)
    return total, (dh_BTD, dhead_DV.astype(head_DV.dtype))


def _backward(residuals, dtotal):
    dh, dhead = (_scaled(g, dtotal) for g in residuals)
    return dh, dhead, None, None


def _scaled(g: jax.Array, dtotal: jax.Array) -> jax.Array:
    # 1 / tokens rounded to bfloat16 would be off by up to 0.4%, for dh and not for the head.
    return (g.astype(dtotal.dtype) * dtotal).astype(g.dtype)


cross_entropy.defvjp(_forward, _backward)


@jax.custom_vjp
def cross_entropy_and_dhead(
    h_BTD: jax.Array,
    head_DV: jax.Array,
    labels_BT: jax.Array,
    weights_BT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`cross_entropy`, and its gradient for the head [D, V] as a value: where the backward pass
    comes much later, it need not be kept until then. No gradient goes to the head.
    """
    total, (_, dhead_DV) = _forward(h_BTD, head_DV, labels_BT, weights_BT)
    return total, dhead_DV


def _both_forward(h_BTD, head_DV, labels_BT, weights_BT):
    total, (dh_BTD, dhead_DV) = _forward(h_BTD, head_DV, labels_BT, weights_BT)
    return (total, dhead_DV), dh_BTD


cross_entropy_and_dhead.defvjp(
    _both_forward, lambda dh_BTD, cotangents: (_scaled(dh_BTD, cotangents[0]), None, None, None)
)


def _nll(h_XD, head_DV, labels_X) -> tuple[jax.Array, jax.Array]:
    """-log p of each label (0 where it is -1), and p [X, V]."""
    logits_XV = wide_einsum("xd,dv->xv", h_XD, head_DV)
    shifted_XV = logits_XV - logits_XV.max(-1, keepdims=True)
    exp_XV = jnp.exp(shifted_XV)
    sum_X1 = exp_XV.sum(-1, keepdims=True)
    own_X1 = jnp.take_along_axis(shifted_XV, jnp.maximum(labels_X, 0)[:, None], -1)
    nll_X = jnp.where(labels_X >= 0, (jnp.log(sum_X1) - own_X1)[:, 0], 0)
    return nll_X, exp_XV / sum_X1


def _weighted(x: jax.Array, weights_X: jax.Array | None) -> jax.Array:
    """[X, ...]"""
    if weights_X is None:
        return x
    return x * jnp.expand_dims(weights_X.astype(x.dtype), tuple(range(1, x.ndim)))


def _chunks(h_BTD, labels_BT, weights_BT) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    h_XD, labels_X = h_BTD.reshape(-1, h_BTD.shape[-1]), labels_BT.reshape(-1)
    pad = -labels_X.size % NUM_CHUNKS
    h_XD = jnp.pad(h_XD, ((0, pad), (0, 0)))
    labels_X = jnp.pad(labels_X, (0, pad), constant_values=-1)
    h_MXD, labels_MX = (
        h_XD.reshape(NUM_CHUNKS, -1, h_XD.shape[-1]),
        labels_X.reshape(NUM_CHUNKS, -1),
    )
    if weights_BT is None:
        return h_MXD, labels_MX, None
    weights_X = jnp.pad(weights_BT.reshape(-1), (0, pad))
    return h_MXD, labels_MX, weights_X.reshape(NUM_CHUNKS, -1)
