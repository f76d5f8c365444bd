"""The one table between Hugging Face's tensors and the model's, walked in both directions.

Projections are stored as released (see `model/mla.py`), so a tensor needs at most a transposition:
theirs is [out, in], ours [in, out]. Their layer L and on are our MTP modules. An MTP module is
released with copies of the embedding and of the head, which we hold once.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

import jax
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.transformer import DeepSeekV3

Kind = Literal["vector", "bias", "table", "matrix", "linear"]
"""vector and table: as it is. bias: the same, always float32. matrix: transposed. linear:
transposed, and in FP8 blocks where a checkpoint is quantised."""

# Hugging Face's name, the path in ours, the kind. E stands for every expert.
_BLOCK = """
input_layernorm.weight                   attention_norm_D      vector
self_attn.q_proj.weight                  mla.w_q_D_HNR         linear
self_attn.q_a_proj.weight                mla.w_dq_DQ           linear
self_attn.q_a_layernorm.weight           mla.q_norm_Q          vector
self_attn.q_b_proj.weight                mla.w_uq_Q_HNR        linear
self_attn.kv_a_proj_with_mqa.weight      mla.w_dkv_D_CR        linear
self_attn.kv_a_layernorm.weight          mla.kv_norm_C         vector
self_attn.kv_b_proj.weight               mla.w_ukv_C_HNU       linear
self_attn.o_proj.weight                  mla.w_o_HU_D          linear
post_attention_layernorm.weight          ffn_norm_D            vector
mlp.gate_proj.weight                     dense.w_gate_DF       linear
mlp.up_proj.weight                       dense.w_up_DF         linear
mlp.down_proj.weight                     dense.w_down_FD       linear
mlp.gate.weight                          moe.router.w_DE       matrix
mlp.gate.e_score_correction_bias         moe.router.bias_E     bias
mlp.experts.E.gate_proj.weight           moe.w_gate_EDF        linear
mlp.experts.E.up_proj.weight             moe.w_up_EDF          linear
mlp.experts.E.down_proj.weight           moe.w_down_EFD        linear
mlp.shared_experts.gate_proj.weight      moe.shared.w_gate_DF  linear
mlp.shared_experts.up_proj.weight        moe.shared.w_up_DF    linear
mlp.shared_experts.down_proj.weight      moe.shared.w_down_FD  linear
"""
_MTP = """
enorm.weight                             embed_norm_D          vector
hnorm.weight                             hidden_norm_D         vector
eh_proj.weight                           w_proj_DD_D           matrix
shared_head.norm.weight                  norm_D                vector
"""
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
SCALES = "_scale_inv"  # follows the name of a weight in FP8
# A buffer that old versions of transformers wrote; it follows from the configuration.
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")
_LAYER = re.compile(r"model\.layers\.([0-9]+)\..*")


class Entry(NamedTuple):
    """One tensor of theirs and where it sits in ours."""

    hf: str
    path: tuple
    """Of the variable in the model's state"""
    index: tuple[int, ...]
    """Of layer and expert in that variable"""
    shape: tuple[int, ...]
    """In their orientation"""
    kind: Kind

    @property
    def transposed(self) -> bool:
        return self.kind in ("matrix", "linear")


class Copy(NamedTuple):
    """One more tensor of theirs that equals `of`. Released ones are written as well as read."""

    hf: str
    of: str
    released: bool


def abstract_model(cfg: ModelConfig) -> DeepSeekV3:
    """A model of shapes, without an array."""
    return jax.eval_shape(lambda: DeepSeekV3(cfg, rngs=nnx.Rngs(0)))


def entries(cfg: ModelConfig, state: nnx.State) -> list[Entry]:
    """Every tensor of this model but the copies, in the order of the layers.

    AssertionError if a variable of `state` is in no row.
    """
    flat = dict(nnx.to_flat_state(state))
    found = [*_walk(cfg, flat)]
    left = set(flat) - {entry.path for entry in found}
    assert not left, f"no row of the table for {left}"
    return found


def entry_count(cfg: ModelConfig) -> int:
    """How many `entries` a model has, at no cost however many that are."""
    attention = 7 if cfg.q_latent is None else 9
    moe = attention + 2 + 3 * cfg.num_experts + (3 if cfg.num_shared_experts else 0)
    layers = cfg.num_dense_layers * (attention + 3) + cfg.num_moe_layers * moe
    return layers + cfg.mtp_depth * (moe + 4) + (2 if cfg.tied_head else 3)


def copies(cfg: ModelConfig) -> list[Copy]:
    """Tensors that repeat another."""
    head = _EMBED if cfg.tied_head else _HEAD
    repeated = [Copy(_HEAD, _EMBED, released=False)] if cfg.tied_head else []
    for k in range(cfg.mtp_depth):
        prefix = f"model.layers.{cfg.num_layers + k}"
        repeated += [
            Copy(f"{prefix}.embed_tokens.weight", _EMBED, released=True),
            Copy(f"{prefix}.shared_head.head.weight", head, released=True),
        ]
    return repeated


def leftover(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Names that no row accounts for, sorted; buffers that follow from the configuration are
    none of them.
    """
    return sorted(n for n in set(names) - set(known) if not _DERIVED.fullmatch(n))


def is_mtp(name: str, num_layers: int) -> bool:
    """Whether a tensor of theirs belongs to a layer after the main model's last."""
    match = _LAYER.fullmatch(name)
    return match is not None and int(match[1]) >= num_layers


def _walk(cfg: ModelConfig, flat: Mapping[tuple, nnx.Variable]) -> Iterator[Entry]:
    yield from _top(flat, _EMBED, ("embed_VD",), "table")
    dense = cfg.num_dense_layers
    for i in range(cfg.num_layers):
        path, index = (("dense_layers",), i) if i < dense else (("moe_layers",), i - dense)
        yield from _rows(_BLOCK, flat, f"model.layers.{i}.", path, (index,))
    yield from _top(flat, "model.norm.weight", ("norm_D",), "vector")
    yield from _top(flat, _HEAD, ("head_DV",), "matrix")
    for k in range(cfg.mtp_depth):
        prefix = f"model.layers.{cfg.num_layers + k}."
        yield from _rows(_MTP, flat, prefix, ("mtp", k), ())
        yield from _rows(_BLOCK, flat, prefix, ("mtp", k, "block"), ())


def _top(flat: Mapping, hf: str, path: tuple, kind: Kind) -> Iterator[Entry]:
    if path in flat:
        yield _entry(flat, hf, path, (), kind)


def _rows(
    table: str, flat: Mapping, prefix: str, path: tuple, index: tuple[int, ...]
) -> Iterator[Entry]:
    """The table's rows that this model has, for one layer."""
    for row in table.strip().splitlines():
        hf, ours, kind = row.split()
        full = (*path, *ours.split("."))
        if full not in flat:
            continue
        if ".E." not in hf:
            yield _entry(flat, prefix + hf, full, index, kind)
            continue
        for e in range(flat[full].shape[len(index)]):
            name = prefix + hf.replace(".E.", f".{e}.")
            yield _entry(flat, name, full, (*index, e), kind)


def _entry(flat: Mapping, hf: str, path: tuple, index: tuple[int, ...], kind: Kind) -> Entry:
    shape = flat[path].shape[len(index) :]
    return Entry(hf, path, index, shape[::-1] if kind in ("matrix", "linear") else shape, kind)
