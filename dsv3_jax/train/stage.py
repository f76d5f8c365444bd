"""What one stage of a pipeline computes for one micro-batch, on one device (report 3.2.1).

`forward` gives what the stage hands on and the residuals of its backward pass: leaves of JAX's own
transposed function, without those that are weights or zeros. `input_gradients` (b) puts these back
and takes the gradients of inputs; of linears it leaves a tape. `weight_gradients` (W) makes of the
tape one product for each linear. What is no linear (gains of norms, routers, the embedding) has its
gradient in b, and so have overflow rounds of the exchange, of which only the routing knows how many
there are, and the weights that expand latents of shared rows, block by block. The head's is made in
F, by the products that the loss takes anyway: kept for b it would be a residual as large as the
head.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.config import RunConfig
from dsv3_jax.data.loader import Batch
from dsv3_jax.model.cross_entropy import cross_entropy_and_dhead
from dsv3_jax.model.fresh import fresh
from dsv3_jax.model.precision import class_of, is_linear
from dsv3_jax.model.router import RouterBias
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.parallel.buckets import ExchangePlan
from dsv3_jax.parallel.mesh import (
    EXPERT_AXES,
    TOKEN_AXES,
    is_stacked,
    parameter_name,
    varying,
    weight_spec,
)
from dsv3_jax.parallel.stages import Cut
from dsv3_jax.quant.fp8 import Blocked
from dsv3_jax.quant.recipes import recipe_of
from dsv3_jax.quant.tape import Slot, Tape
from dsv3_jax.quant.trained_weight import TrainedWeight
from dsv3_jax.quant.wide import wide
from dsv3_jax.train.loss import LossParts, stage_loss

Arrays = dict[str, Any]  # by parameter's name


class Numbers(NamedTuple):
    """Of a whole step, scalars."""

    valid_tokens: jax.Array
    mtp_weight: jax.Array
    row_share: jax.Array
    """Of a micro-batch on one device in the step's rows: 1 / (micro-batches * devices)"""


class Passed(NamedTuple):
    """A forward pass's results."""

    h_BTD: jax.Array | None
    """For the next stage; None of the last one"""
    residuals: list[jax.Array]
    dhead: Arrays
    """The gradient of the head's parameter, if the stage has losses"""
    total: jax.Array
    parts: LossParts


class Returned(NamedTuple):
    """A backward pass's results for inputs."""

    dx_BTD: jax.Array | None
    """For the stage before; None of the first one"""
    row_is_finite_B: jax.Array | None
    """Of the first stage alone: whether each row's gradient is"""
    grads: Arrays
    """Of what is no linear, and of `Stage.not_put_off`"""
    tape: dict[str, tuple[jax.Array, ...]]


class Stage:
    """Of a run, the part between two cuts; what it computes on one device."""

    def __init__(
        self,
        cfg: RunConfig,
        cut: Cut,
        plan: ExchangePlan | None,
        masters: jnp.dtype = jnp.float32,
    ) -> None:
        """`masters` is the dtype of the master weights."""
        self.cfg, self.cut, self.plan, self.masters = cfg, cut, plan, masters
        self.is_last = cut.end_mtp == cfg.model.mtp_depth and (cut.head or cut.has_mtp)
        self.graphdef, self.params, self.biases = jax.eval_shape(
            lambda: _split(DeepSeekV3(cfg.model, rngs=nnx.Rngs(0), dtype=masters, cut=cut))
        )
        self.shapes = {
            parameter_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(self.params)
        }
        self.names = list(self.shapes)
        self.tape = Tape()
        self._tree, self._weight_of = None, []

    def drawn(self, key: jax.Array) -> tuple[nnx.State, nnx.State]:
        """Masters and router biases from a run's key."""
        model = fresh(self.cfg.model, key, self.masters, self.cut)
        return _split(model)[1:]

    @property
    def dtype(self) -> jnp.dtype:
        """Of activations."""
        return jnp.dtype(self.cfg.train.dtype)

    @property
    def head(self) -> str | None:
        """The name of the parameter that logits are made with, if they are made here."""
        if not (self.cut.head or self.cut.has_mtp):
            return None
        return "embed_VD" if self.cfg.model.tied_head else "head_DV"

    @cached_property
    def in_backward(self) -> tuple[str, ...]:
        """Parameters whose gradient comes with that of inputs, in whole or in part."""
        direct = [n for n in self.names if not is_linear(n) and (n != self.head or n == "embed_VD")]
        return (*direct, *self.not_put_off)

    @cached_property
    def not_put_off(self) -> tuple[str, ...]:
        """Weights with products whose gradient is not put off: experts', if there are overflow
        rounds, and of shared rows those that expand latents, block by block.
        """
        experts = [n for n in self.names if self.plan and EXPERT_AXES in weight_spec(n)]
        return (*experts, *self._expanding)

    @cached_property
    def _expanding(self) -> tuple[str, ...]:
        shared = self.plan and self.plan.rows
        return tuple(n for n in self.names if shared and n.endswith("w_ukv_C_HNU"))

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """Parameters whose gradient W makes, or a part of it."""
        return tuple(n for n in self.names if is_linear(n) and n not in self._expanding)

    # --- weights ---------------------------------------------------------------------------------

    def computed(self, name: str, master: jax.Array) -> jax.Array | Blocked:
        """A master as forward and backward passes of a step take it."""
        rule = self._rule(name)
        if rule:
            return rule.quantized(master)
        return master.astype(self.dtype) if is_linear(name) else master

    def zeros(self, name: str, weight: jax.Array | Blocked) -> jax.Array:
        """A gradient of nothing."""
        return jnp.zeros(weight.shape, wide(self.dtype))

    def _rule(self, name: str) -> Any:
        return recipe_of(self.cfg.quant).get(class_of(name))

    def _model(
        self,
        weights: Arrays,
        biases: nnx.State,
        left: Mapping,
        overflow: Mapping,
        tape: Tape | None = None,
    ) -> Any:
        tape = tape or self.tape

        def one(path: tuple, _: Any) -> Any:
            name = parameter_name(path)
            if not is_linear(name):
                return weights[name]
            slot = Slot(left.get(name, ()), name, tape, wide(self.dtype))
            return TrainedWeight(weights[name], slot, self._rule(name), overflow=overflow.get(name))

        params = jax.tree_util.tree_map_with_path(one, self.params)
        return nnx.merge(self.graphdef, params, biases)

    # --- passes ----------------------------------------------------------------------------------

    def forward(
        self,
        weights: Arrays,
        biases: nnx.State,
        x_BTD: jax.Array | None,
        batch: Batch,
        numbers: Numbers,
    ) -> Passed:
        """F, within a `shard_map`. It also notes the tape and how residuals are put together."""
        if not self.tape.entries:  # notes what linears will leave
            _, overflow = self._slots(weights)
            model = self._model(weights, biases, {}, overflow)
            jax.eval_shape(lambda x: self._loss(model, x, batch, numbers)[0][1], x_BTD)
        direct = {n: weights[n] for n in self.names if not is_linear(n) and n != self.head}
        if self.head == "embed_VD":
            direct["embed_VD"] = weights["embed_VD"]
        left, overflow = self._slots(weights)
        slot_B = jnp.zeros(len(batch.labels_BT), wide(self.dtype)) if self.cut.embed else None
        slot_B = varying(slot_B, TOKEN_AXES)

        def of(direct, left, overflow, x_BTD, slot_B):
            model = self._model({**weights, **direct}, biases, left, overflow)
            return self._loss(model, x_BTD, batch, numbers, slot_B)

        (h_BTD, total), pull, (parts, dhead) = jax.vjp(
            of, direct, left, overflow, x_BTD, slot_B, has_aux=True
        )
        leaves, self._tree = jax.tree.flatten(pull)
        given = jax.tree.leaves((weights, biases, left, overflow))
        place = {id(leaf): i for i, leaf in enumerate(given)}
        self._weight_of = [place.get(id(leaf)) for leaf in leaves]
        kept = [x for x, i in zip(leaves, self._weight_of, strict=True) if i is None]
        return Passed(h_BTD, kept, dhead, total, parts)

    def _slots(self, weights: Arrays) -> tuple[Any, Arrays]:
        """Zeros for what linears leave, and for gradients of weights that are `not_put_off`."""
        left = {name: self._left(name) for name in self.tape.entries}
        overflow = {name: self.zeros(name, weights[name]) for name in self.not_put_off}
        return varying((left, overflow), TOKEN_AXES)

    def _left(self, name: str) -> tuple[jax.Array, ...]:
        stack = self.shapes[name].shape[: is_stacked(name)]
        return tuple(jnp.zeros((*stack, *x.shape), x.dtype) for x in self.tape.entries[name].zeros)

    def _loss(self, model, x_BTD, batch, numbers, slot_B=None) -> Any:
        """(what is handed on, loss), (parts, the head's gradient)."""
        dheads = []

        def nats(h_BTD, head_DV, labels_BT, weights_BT, share) -> jax.Array:
            total, dhead_DV = cross_entropy_and_dhead(h_BTD, head_DV, labels_BT, weights_BT)
            dheads.append(dhead_DV.astype(wide(self.dtype)) * share)
            return total

        h_BTD, total, parts = stage_loss(
            model,
            x_BTD,
            batch,
            numbers.valid_tokens,
            numbers.mtp_weight,
            self.cfg.train,
            numbers.row_share,
            slot_B,
            self.plan,
            nats,
        )
        dhead = {}
        if dheads:
            dhead_DV = sum(dheads[1:], dheads[0])
            dhead[self.head] = dhead_DV.T if self.cfg.model.tied_head else dhead_DV
        total = varying(total, TOKEN_AXES)  # even of a stage without losses
        return (None if self.is_last else h_BTD, total), (parts, dhead)

    def evaluate(
        self,
        weights: Arrays,
        biases: nnx.State,
        x_BTD: jax.Array | None,
        batch: Batch,
        told: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    ) -> jax.Array:
        """What the stage hands on, without gradients; the head's: `told` of normed hidden states,
        head [D, V] and labels.
        """
        model = self._model(weights, biases, {}, {}, Tape())  # nothing is to be left
        valid_BT = batch.labels_BT >= 0
        if self.cut.embed:
            x_BTD = model.embed(batch.tokens_BT, self.dtype)
        x_BTD, _ = model.layers(
            x_BTD, batch.tokens_BT, valid_BT, segments_BT=batch.segments_BT, plan=self.plan
        )
        if not self.cut.head:
            return x_BTD
        return told(model.normed(x_BTD), model.head(), batch.labels_BT)

    def input_gradients(
        self,
        weights: Arrays,
        biases: nnx.State,
        residuals: list[jax.Array],
        dh_BTD: jax.Array | None,
    ) -> Returned:
        """b, of a forward pass traced before."""
        kept, given = iter(residuals), jax.tree.leaves((weights, biases, *self._slots(weights)))
        leaves = [next(kept) if i is None else given[i] for i in self._weight_of]
        pull = jax.tree.unflatten(self._tree, leaves)
        one = varying(jnp.ones((), wide(self.dtype)), TOKEN_AXES)
        grads, tape, overflow, dx_BTD, dslot_B = pull((dh_BTD, one))
        is_finite_B = None if dslot_B is None else jnp.isfinite(dslot_B)
        return Returned(dx_BTD, is_finite_B, {**grads, **overflow}, tape)

    def weight_gradients(self, tape: Mapping[str, tuple[jax.Array, ...]]) -> Arrays:
        """W."""
        grads = {}
        for name, left in tape.items():
            gradients: Callable = self.tape.entries[name].gradients
            grads |= (jax.vmap(gradients) if is_stacked(name) else gradients)(left)
        return grads


def _split(model: DeepSeekV3) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Structure, parameters and router biases."""
    return nnx.split(model, nnx.Param, RouterBias)
