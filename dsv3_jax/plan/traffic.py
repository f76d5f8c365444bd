"""What crosses between devices: bytes of the expert exchange, of pipeline messages and of ZeRO-1
(report 3.2).
"""

from collections.abc import Collection
from dataclasses import dataclass

from dsv3_jax.config import RunConfig
from dsv3_jax.parallel.stages import Cut
from dsv3_jax.plan.products import items_in

FP32 = 4  # bytes
ITEM_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
FP8_DISPATCH = ("fp8", "fp8_pow2", "fp8_square_gradients")  # recipes
FP8_GRADIENTS = ("fp8", "fp8_pow2")


def plain_row(width: int, dtype: str = "bfloat16") -> int:
    """Bytes of a token on the wire: 14,336 in bfloat16 at d = 7168."""
    return ITEM_BYTES[dtype] * width


def fp8_row(width: int) -> int:
    """The same in E4M3 with an FP32 scale for each 128 numbers: 7,392 at d = 7168. As DeepEP sends
    it, whose rates the plan uses; our own wire packs a power of two in a byte, 7,224.
    """
    return width + FP32 * -(-width // 128)


@dataclass(frozen=True)
class Exchange:
    """One MoE layer's traffic per token: to the experts and back, forward and backward."""

    nodes: int
    """That a token goes to, at most, its own among them; each gets it once (report 3.2.2)"""
    copies: int
    """Behind it, to devices of the node: one an expert"""
    dispatch: int
    """Bytes of a row on the way to experts"""
    combine: int
    """Of a row of results, and of a row of gradients of inputs"""
    gradient_dispatch: int
    """Of a row of gradients of results"""

    def node_hop(self, row: int) -> int:
        """Bytes per token between nodes; 0 if there is one."""
        return row * self.nodes if self.nodes > 1 else 0

    def local_hop(self, row: int) -> int:
        """Bytes per token within nodes."""
        return row * self.copies


def exchange_of(cfg: RunConfig) -> Exchange | None:
    """Of a run; None where every device holds all experts, or there are none."""
    model, recipe = cfg.model, cfg.quant.recipe
    if cfg.mesh.expert_shards == 1 or not (model.num_moe_layers or model.mtp_depth):
        return None
    plain = plain_row(model.d_model, cfg.train.dtype)
    small = fp8_row(model.d_model)
    return Exchange(
        nodes=cfg.mesh.nodes_per_token(model),
        copies=model.experts_per_token if cfg.mesh.local > 1 else 0,
        dispatch=small if recipe in FP8_DISPATCH else plain,
        combine=plain,
        gradient_dispatch=small if recipe in FP8_GRADIENTS else plain,
    )


def message_bytes(cfg: RunConfig) -> int:
    """Of a pipeline message of one device: a micro-batch's residual stream, or its gradient."""
    return plain_row(cfg.model.d_model, cfg.train.dtype) * tokens_of_microbatch(cfg)


def tokens_of_microbatch(cfg: RunConfig) -> int:
    """Of one device."""
    rows = cfg.train.rows // cfg.train.microbatches // cfg.mesh.row_groups
    return rows * cfg.part_length


@dataclass(frozen=True)
class Gather:
    """One layer's traffic of a device for the latents of rows that it shares, in bytes."""

    forward: int
    """The other devices' latents"""
    backward: int
    """The same again, and what the device found of their gradients, in at least float32"""
    held: int
    """Of whole rows, while the layer is computed: latents, their gradients, and these once more on
    their way to their owners"""


def gather_of(cfg: RunConfig) -> Gather | None:
    """Of a run; None where a device has whole rows."""
    if cfg.mesh.row_shards == 1:
        return None
    item, whole = ITEM_BYTES[cfg.train.dtype], tokens_of_microbatch(cfg) * cfg.mesh.row_shards
    numbers = whole * (cfg.model.kv_latent + cfg.model.rope_dim)
    others = numbers - numbers // cfg.mesh.row_shards
    wide = max(FP32, item)
    return Gather(others * item, others * (item + wide), numbers * (item + 2 * wide))


@dataclass(frozen=True)
class Weights:
    """Parameters of one device's stages, in elements."""

    shared: int
    """Held whole by every device of a pipeline rank"""
    experts: int
    """This device's share of the routed experts"""

    def owned(self, cfg: RunConfig) -> float:
        """Of them, those whose masters and moments lie here (ZeRO-1)."""
        return self.shared / cfg.mesh.token_shards + self.experts / cfg.mesh.data

    def crossing(self, cfg: RunConfig) -> float:
        """Elements that a gather or a scatter brings here or takes away."""
        return self.shared + self.experts - self.owned(cfg)


def weights_of(cfg: RunConfig, cuts: Collection[Cut], borrowed: bool = True) -> Weights:
    """Of these stages of a rank; gains of norms, a ten-thousandth of a model, are left out.

    `borrowed`: embedding and head too where MTP computes with them, or a tied head with the
    embedding, and their masters are another stage's.
    """
    model = cfg.model
    products = [p for cut in cuts for item in items_in(model, cut) for p in item.products]
    embeds = any(cut.embed for cut in cuts)
    heads = any(cut.head for cut in cuts)
    if borrowed:
        embeds |= any(cut.has_mtp or (model.tied_head and cut.head) for cut in cuts)
        heads |= any(cut.has_mtp for cut in cuts)
    tables = embeds + (heads and not model.tied_head)
    shared = sum(p.parameters for p in products if not (p.routed or p.at_once))
    experts = sum(p.parameters for p in products if p.routed)
    return Weights(
        shared + tables * model.vocab_size * model.d_model, experts // cfg.mesh.expert_shards
    )


@dataclass(frozen=True)
class ZeroTraffic:
    """Bytes of one device and step, of the rank that moves most."""

    scatter: float
    """Gradients, FP32, summed once a step"""
    gather: float
    """Weights in train.dtype, once a step"""
    swap: float
    """Of what has its masters on other ranks, DualPipe's second copy and MTP's embedding: gradients
    there, weights back, each device its shard"""
    update: float
    """Device memory's: FP32 masters and both moments read and written, gradients read, compute
    weights written"""

    @property
    def total(self) -> float:
        """Bytes over links."""
        return self.scatter + self.gather + self.swap


def zero_traffic(cfg: RunConfig, held: Weights, mastered: Weights) -> ZeroTraffic:
    """Of a rank whose stages have `held` weights, and masters of those `mastered`: of all others,
    as under DualPipe of one of both stages, it swaps gradients and weights with ranks that have
    theirs.
    """
    crossing, owned = held.crossing(cfg), mastered.owned(cfg)
    copied = held.owned(cfg) - owned
    weight, moment = ITEM_BYTES[cfg.train.dtype], ITEM_BYTES[cfg.optimizer.moment_dtype]
    return ZeroTraffic(
        scatter=FP32 * crossing,
        gather=weight * crossing,
        swap=(FP32 + weight) * copied,
        update=(2 * FP32 + 4 * moment + FP32 + weight) * owned,
    )
