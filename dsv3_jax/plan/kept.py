"""Bytes that a micro-batch keeps on one device, in closed form: residuals between a stage's forward
and backward pass, and operands of weights' gradients between b and W (report 3.2.3, 3.3.3).

What is kept is decided in `model/block.py` (recomputation), `quant/gemm.py` and `quant/fp8_gemm.py`
(operands) and `parallel/dispatch.py` (what has come from other devices). Indices and flags of less
than a byte per number are left out; `plan/compile.py` holds the sums against compiled programs.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from dsv3_jax.config import RunConfig
from dsv3_jax.model.moe import block_rows, num_blocks
from dsv3_jax.parallel.buckets import make_exchange_plan
from dsv3_jax.parallel.stages import Cut
from dsv3_jax.parallel.wire import row_bytes, wire_of_rules
from dsv3_jax.plan.cuts import layer_counts
from dsv3_jax.plan.traffic import ITEM_BYTES, tokens_of_microbatch
from dsv3_jax.quant.formats import format_of
from dsv3_jax.quant.recipes import RECIPES, Operand

Bytes = Mapping[str, int]


@dataclass(frozen=True)
class Rows:
    """Of one micro-batch on one device."""

    tokens: int
    hop_1: int
    """Of the buckets from other nodes; 0 without that hop"""
    hop_2: int
    """Of the buckets of a node; 0 where all experts are at hand"""
    blocks: int
    """Of experts' blocks, filled or not"""
    block: int
    """Of one of these"""


def rows_of(cfg: RunConfig) -> Rows:
    """From a run's configuration."""
    model, tokens = cfg.model, tokens_of_microbatch(cfg)
    plan = make_exchange_plan(cfg.mesh, model)
    if plan is None:
        copies, experts, hop_1, hop_2 = tokens * model.experts_per_token, model.num_experts, 0, 0
    else:
        hop_1 = plan.nodes * plan.node_rows(tokens) if plan.nodes > 1 else 0
        hop_2 = plan.locals * plan.local_rows(tokens, model.experts_per_token)
        copies, experts = hop_2, plan.num_local
    rows = block_rows(copies, experts)
    return Rows(tokens, hop_1, hop_2, num_blocks(copies, experts, rows) * rows, rows)


class Kept:
    """Of one run's micro-batches."""

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg, self.model, self.rows = cfg, cfg.model, rows_of(cfg)
        self.item = ITEM_BYTES[cfg.train.dtype]
        self.high = max(4, self.item)
        self.recipe = RECIPES[cfg.quant.recipe]

    @property
    def _shared(self) -> bool:
        """Whether devices share rows."""
        return self.cfg.mesh.row_shards > 1

    # --- residuals of a stage --------------------------------------------------------------------

    def residuals(self, cut: Cut) -> Bytes:
        """By part of the model."""
        found, modules = Counter(), cut.num_mtp
        dense, moe = layer_counts(self.model, cut)
        found.update(_times(self.dense_layer, dense))
        found.update(_times(self.moe_layer, moe + modules))
        # The head keeps its gradient for h beside the final norm's input. A module has a head, and
        # keeps what it takes: hidden states, embedding and, computed again or not, their sum.
        found["head"] += (2 * cut.head + modules) * self._stream
        if self.cfg.mesh.pipe == 1:  # stages add the head's gradient, float32, up in F
            gradient = 4 * self.model.d_model * self.model.vocab_size
            found["head's gradients"] += (cut.head + modules) * gradient
        more = {"none": 5, "report": 1, "full": 1}[self.cfg.train.remat]
        found["MTP's input"] += modules * more * self._stream
        angles = self.rows.tokens * self.model.rope_dim * 4
        found["rotations"] += angles * (modules + (cut.first_layer < cut.end_layer))
        return {name: count for name, count in found.items() if count}

    @property
    def _stream(self) -> int:
        """One residual stream [T, D]."""
        return self.rows.tokens * self.model.d_model * self.item

    @cached_property
    def dense_layer(self) -> Bytes:
        """A layer with a dense feed-forward."""
        if self.cfg.train.remat == "full":
            return {"layer inputs": self._stream}
        return self._attention_half() | {
            "feed-forward": self._feed_forward("w_down_FD", self.model.dense_hidden)
        }

    @cached_property
    def moe_layer(self) -> Bytes:
        """A layer with experts."""
        if self.cfg.train.remat == "full":
            return {"layer inputs": self._stream}
        model = self.model
        shared = model.num_shared_experts * model.expert_hidden
        return self._attention_half() | {
            "feed-forward": self._feed_forward("w_down_FD", shared) if shared else 0,
            "router": self._router(),
            "experts": self._experts(),
        }

    def _attention_half(self) -> dict[str, int]:
        model, t = self.model, self.rows.tokens
        out = t * model.num_heads * (model.v_dim * self.item + self.high)  # and log-sum-exp
        latents = t * ((model.q_latent or 0) + model.kv_latent + model.rope_dim) * self.item
        if self.cfg.train.remat == "report":
            return {"layer inputs": 2 * self._stream, "attention": out, "latents": latents}
        heads = model.num_heads * (model.nope_dim + model.rope_dim)
        widths = [model.d_model, model.d_model, model.q_latent or 0]
        if self._shared:  # keys and values are made again from latents
            own = t * (heads + model.kv_latent + model.rope_dim) * self.item
        else:
            own = t * (2 * heads + model.num_heads * model.v_dim) * self.item
            widths.append(model.kv_latent)
        inputs = sum(self._input("linear", width) for width in widths)
        inputs += self._input("after_attention", model.num_heads * model.v_dim)
        latents -= t * model.rope_dim * self.item
        attention = out + own + t * inputs
        return {"layer inputs": 2 * self._stream, "attention": attention, "latents": latents}

    def _feed_forward(self, down: str, hidden: int) -> int:
        """SwiGLU's arguments; where all is kept, the two products' inputs too."""
        kept = self._activation("after_swiglu", hidden)
        if self.cfg.train.remat == "none":
            kept += self._input("linear", self.model.d_model)
            kept += 0 if self.recipe else hidden * self.item
        return self.rows.tokens * kept

    def _router(self) -> int:
        """Scores, choices, and of an exchange the tables."""
        model, rows = self.model, self.rows
        scores = model.num_experts * self.high * (1 + (self.cfg.train.remat == "none"))
        tables = 4 * (3 * rows.hop_2 + rows.blocks + rows.hop_1 * (model.experts_per_token + 1))
        kept = rows.tokens * (scores + 8 * model.experts_per_token) + tables
        if self.cfg.train.remat == "none":  # the router's input, wide; what overflow rounds need
            kept += self._stream * self.high // self.item + (self._stream if rows.hop_2 else 0)
        return kept

    def _experts(self) -> int:
        model, rows = self.model, self.rows
        kept = rows.blocks * self._activation("expert_after_swiglu", model.expert_hidden)
        if self.cfg.train.remat == "report":
            return kept + rows.hop_2 * (self._wire_bytes + 4) if rows.hop_2 else kept
        kept += rows.blocks * (self._input("dispatched", model.d_model) + 4)
        return kept + (0 if self.recipe else rows.blocks * model.expert_hidden * self.item)

    @property
    def _wire_bytes(self) -> int:
        """A row that has come from another device."""
        width = self.model.d_model
        if not self.recipe:
            return width * self.item
        rules = self.recipe["dispatched"], self.recipe["expert_after_swiglu"]
        return row_bytes(wire_of_rules(*rules).there, width, self.item)

    # --- operands of weights' gradients ----------------------------------------------------------

    def tape(self, cut: Cut) -> int:
        """Bytes that wait between b and W: of every product x and dy."""
        model, modules = self.model, cut.num_mtp
        dense, moe = layer_counts(model, cut)
        moe += modules
        attention = (dense + moe) * self._attention_tape
        hidden, expert = model.dense_hidden, model.expert_hidden
        found = attention + dense * self._ffn_tape(hidden, "linear", "after_swiglu", False)
        shared = model.num_shared_experts * expert
        if shared:
            found += moe * self._ffn_tape(shared, "linear", "after_swiglu", False)
        found += moe * self._ffn_tape(expert, "dispatched", "expert_after_swiglu", True)
        return found + modules * 3 * self._stream  # the projection, [2 D] to [D]

    @cached_property
    def _attention_tape(self) -> int:
        model = self.model
        d, q, heads = model.d_model, model.q_latent, model.num_heads
        query = heads * (model.nope_dim + model.rope_dim)
        expanded = heads * (model.nope_dim + model.v_dim)
        products = [
            ("linear", d, model.kv_latent + model.rope_dim),
            *([] if self._shared else [("linear", model.kv_latent, expanded)]),
            ("after_attention", heads * model.v_dim, d),
            *([("linear", d, q), ("linear", q, query)] if q else [("linear", d, query)]),
        ]
        return sum(
            self.rows.tokens * self._input(kind, width) + self._dy(kind, self.rows.tokens, out)
            for kind, width, out in products
        )

    def _ffn_tape(self, hidden: int, up: str, down: str, routed: bool) -> int:
        d, rows = self.model.d_model, self.rows.blocks if routed else self.rows.tokens
        behind = self._activation(down, hidden) if self.recipe else hidden * self.item
        gates = 4 * rows if routed and self.recipe else 0
        found = rows * (self._input(up, d) + behind) + gates
        group = self.rows.block if routed else None
        return found + self._dy(up, rows, 2 * hidden, group) + self._dy(down, rows, d, group)

    # --- bytes of rows ---------------------------------------------------------------------------

    def _input(self, kind: str, width: int) -> int:
        """Of a row of a linear's input."""
        if not self.recipe:
            return width * self.item
        operand = self.recipe[kind].kept
        if operand.block is None:  # one scale for all rows
            return width * format_of(operand.fmt).bits // 8
        return stored(operand, 1, width)

    def _activation(self, kind: str, hidden: int) -> int:
        """Of a row of SwiGLU's two arguments."""
        return self._input(kind, 2 * hidden)

    def _dy(self, kind: str, rows: int, width: int, group: int | None = None) -> int:
        """Of all rows of a product's output gradient; no scale reaches over a group of rows."""
        if not self.recipe:
            return rows * width * self.item
        operand = self.recipe[kind].wgrad_grad_output
        group = rows if group is None or operand.block is None else group
        return rows // group * stored(operand, group, width)


def stored(operand: Operand, rows: int, width: int) -> int:
    """Bytes of [rows, width] quantised: values of 8 or 12 bits, and a scale for each block, of a
    byte where it is a power of two, else of four.
    """
    values = rows * width * format_of(operand.fmt).bits // 8
    if operand.block is None:
        return values + 4
    blocks = -(-rows // operand.block[0]) * -(-width // operand.block[1])
    return values + blocks * (4 if operand.scale == "float32" else 1)


def _times(layer: Bytes, count: int) -> dict[str, int]:
    return {name: count * size for name, size in layer.items()}
