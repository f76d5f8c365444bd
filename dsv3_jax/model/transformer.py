"""DeepSeek-V3 on one device: embedding, dense layers, MoE layers, head, MTP modules (report 2); or
a stretch of it, as a stage of a pipeline holds.

Layers of a kind are stacked. Deep stacks are scanned, so that a program's size does not grow with
depth. Forward passes change nothing: router statistics come back as values.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.block import Block, Remat, rematerialised
from dsv3_jax.model.layers import Init, rms_norm
from dsv3_jax.model.mtp import MTP, same_segment, shift_left
from dsv3_jax.model.router import RouterStats
from dsv3_jax.model.yarn import rope_table
from dsv3_jax.parallel.buckets import ExchangePlan
from dsv3_jax.parallel.sequence import RowShards
from dsv3_jax.parallel.stages import Cut, whole
from dsv3_jax.quant.gemm import few_rows_einsum

# So few layers of a kind are written out in the program: what they keep for the backward pass need
# not go into a stack and out again, an eighth to a third of a step's time on CPUs, while compiling
# takes little longer. A program for more layers would grow with depth.
UNROLLED = 8


class DeepSeekV3(nnx.Module):
    """The model, or the part that `cut` leaves of it. Weights of `dense_layers` and `moe_layers`
    carry a leading layer dimension.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        cut: Cut | None = None,
        init_type: type[Init] = Init,
    ) -> None:
        """`init_type` gives the parameters their values."""
        self.cfg = cfg
        self.cut = cut = cut or whole(cfg.num_layers, cfg.mtp_depth)
        init = init_type(rngs.params(), cfg.init_std, dtype)
        layers = init.at("layers")
        has_logits = cut.head or cut.has_mtp
        if cut.embed or cut.has_mtp or (has_logits and cfg.tied_head):
            self.embed_VD = init.normal("embed_VD", cfg.vocab_size, cfg.d_model)
        dense = cfg.num_dense_layers
        self.dense_layers = _stack(cfg, layers, cut.layers(0, dense), moe=False)
        self.moe_layers = _stack(cfg, layers, cut.layers(dense, cfg.num_layers), moe=True)
        if cut.head:
            self.norm_D = init.ones(cfg.d_model)
        if has_logits and not cfg.tied_head:
            self.head_DV = init.normal("head_DV", cfg.d_model, cfg.vocab_size)
        mtp = init.at("mtp")
        depths = range(cut.first_mtp, cut.end_mtp)
        self.mtp = nnx.List([MTP(cfg, init=mtp.layer(k)) for k in depths])

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """int32 [B, T] -> logits of the next token [B, T, V], at least float32."""
        return self.logits(self.hidden(tokens_BT)[0])

    def logits(self, h_BTD: jax.Array) -> jax.Array:
        """Output head on normed hidden states, at least float32."""
        h_XD = h_BTD.reshape(-1, h_BTD.shape[-1])
        logits_XV = few_rows_einsum("xd,dv->xv", h_XD, self.head().astype(h_BTD.dtype))
        return logits_XV.reshape(*h_BTD.shape[:2], -1)

    def head(self) -> jax.Array:
        return self.embed_VD[...].T if self.cfg.tied_head else self.head_DV[...]

    def embed(
        self,
        tokens_BT: jax.Array,
        dtype: jnp.dtype | None = None,
        slot_B: jax.Array | None = None,
    ) -> jax.Array:
        """Embedding rows in `dtype` (default: the weights'), the activations' from here on.

        `slot_B` are zeros, added to a row's: where a row's gradient is not finite, the slot's is
        not. ValueError for rows longer than the model.
        """
        if tokens_BT.shape[1] > self.cfg.max_length:
            raise ValueError(
                f"{tokens_BT.shape[1]} tokens in a row; "
                f"allowed: at most model.max_length = {self.cfg.max_length}"
            )
        x_BTD = self.embed_VD[...][tokens_BT].astype(dtype or self.embed_VD.dtype)
        return x_BTD if slot_B is None else x_BTD + slot_B.astype(x_BTD.dtype)[:, None, None]

    def hidden(
        self,
        tokens_BT: jax.Array,
        valid_BT: jax.Array | None = None,
        dtype: jnp.dtype | None = None,
        remat: Remat = "none",
        segments_BT: jax.Array | None = None,
        plan: ExchangePlan | None = None,
    ) -> tuple[jax.Array, RouterStats]:
        """Hidden states after the final norm [B, T, D] in `dtype`, and router statistics stacked
        over the MoE layers.

        Args:
            valid_BT: bool, default all: the tokens that count in the statistics; all are computed.
            segments_BT: int32; tokens of one segment see each other only, and count positions from
                its start.
            plan: of the exchange with experts on other devices, within a `shard_map`; where it
                splits rows, all arrays are this device's parts of them.
        """
        x_BTD = self.embed(tokens_BT, dtype)
        x_BTD, stats = self.layers(x_BTD, tokens_BT, valid_BT, remat, segments_BT, plan)
        return self.normed(x_BTD), stats

    def normed(self, x_BTD: jax.Array) -> jax.Array:
        """Behind the last layer."""
        return rms_norm(x_BTD, self.norm_D[...], self.cfg.rms_eps)

    def layers(
        self,
        x_BTD: jax.Array,
        tokens_BT: jax.Array,
        valid_BT: jax.Array | None = None,
        remat: Remat = "none",
        segments_BT: jax.Array | None = None,
        plan: ExchangePlan | None = None,
    ) -> tuple[jax.Array, RouterStats]:
        """The stream behind the layers that are here, and statistics stacked over their routers;
        arguments as of `hidden`.
        """
        valid_BT = jnp.ones(tokens_BT.shape, bool) if valid_BT is None else valid_BT
        places = positions(tokens_BT, segments_BT, plan and plan.rows)
        rope_BTR = rope_table(self.cfg, places, x_BTD.dtype)

        def run(x_BTD, layers):
            count = len(layers.ffn_norm_D)
            scanned = count > UNROLLED
            body = rematerialised(
                lambda x, block: block(x, rope_BTR, valid_BT, segments_BT, plan),
                remat,
                scanned=scanned,
            )
            return lax.scan(body, x_BTD, layers, unroll=1 if scanned else count)

        if self.dense_layers is not None:
            x_BTD, _ = run(x_BTD, self.dense_layers)
        stats = RouterStats(
            jnp.zeros((0, self.cfg.num_experts), jnp.int32), jnp.zeros(0, rope_BTR.dtype)
        )
        if self.moe_layers is not None:
            x_BTD, stats = run(x_BTD, self.moe_layers)
        return x_BTD, stats

    def mtp_hidden(
        self,
        h_BTD: jax.Array,
        tokens_BT: jax.Array,
        valid_BT: jax.Array | None = None,
        remat: Remat = "none",
        segments_BT: jax.Array | None = None,
        plan: ExchangePlan | None = None,
    ) -> list[tuple[jax.Array, RouterStats]]:
        """Normed hidden states and statistics of each depth that is here, from the main model's
        `hidden`, or in a later stage from the depth before.

        Depth k is valid on the first T - k tokens of a segment (without segments, of a row).
        """
        valid_BT = jnp.ones(tokens_BT.shape, bool) if valid_BT is None else valid_BT
        shards = plan and plan.rows
        rope_BTR = rope_table(self.cfg, positions(tokens_BT, segments_BT, shards), h_BTD.dtype)
        outputs = []
        for k, module in enumerate(self.mtp, start=self.cut.first_mtp + 1):
            embedded_BTD = self.embed(shift_left(tokens_BT, k, 0, shards), h_BTD.dtype)
            valid = valid_BT & shift_left(valid_BT, k, False, shards)
            valid &= same_segment(segments_BT, k, shards)
            depth = rematerialised(
                lambda m, h, e, valid=valid: m(h, e, rope_BTR, valid, segments_BT, plan),
                remat,
                scanned=False,
            )
            h_BTD, stats = depth(module, h_BTD, embedded_BTD)
            outputs.append((h_BTD, stats))
        return outputs


def positions(
    tokens_BT: jax.Array, segments_BT: jax.Array | None, shards: RowShards | None = None
) -> jax.Array:
    """Of every token in its segment, int32 [B, T]; in its row, [1, T], without segments. With
    `shards` of this device's part of rows.
    """
    if shards:
        if segments_BT is None:
            return shards.places(tokens_BT.shape[1])[None]
        whole_BT = shards.whole(segments_BT)
        return shards.own(positions(whole_BT, whole_BT))
    places = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
    if segments_BT is None:
        return places
    starts_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)))
    return places - lax.cummax(jnp.where(starts_BT, places, 0), axis=1)


def _stack(cfg: ModelConfig, init: Init, layers: range, *, moe: bool) -> Block | None:
    """These layers in one module with a leading dimension; None if there are none."""
    if not layers:
        return None
    indices = jnp.arange(layers.start, layers.stop)
    return jax.vmap(lambda i: Block(cfg, moe=moe, init=init.layer(i)))(indices)
