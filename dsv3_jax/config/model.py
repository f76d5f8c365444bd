"""The architecture as data: every size of a DeepSeek-V3 model with its letter (report 2, 4.2).

The letters are the legend of all array names in the project. `B` rows, `T` query tokens, `S` key
tokens, `J` copies of tokens (K of each), `X` slots of copies after dispatch and `M` parts of a
batch belong to a run; the others stand beside their field below. A lower-case letter counts the
same dimension in blocks. Where dimensions are fused, an underscore begins the next one:
`w_uq_Q_HNR` is [Q, H (N + R)], H heads of N + R columns.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

from dsv3_jax.config.fields import check_types, shown


@dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension (report 4.3).

    Active once `ModelConfig.max_length` exceeds `original_length`.
    """

    factor: float = 40.0
    """Context extension factor s; 1 switches YaRN off"""
    beta_fast: float = 32.0
    """Dimensions that turn more often than this over the original length keep their frequency"""
    beta_slow: float = 1.0
    """Dimensions that turn less often than this are slowed by the factor"""
    mscale: float = 1.0
    """Coefficient of 0.1 ln s in the numerator of the cos/sin multiplier"""
    mscale_all_dim: float = 1.0
    """Coefficient of 0.1 ln s in the softmax scale"""
    original_length: int = 4096
    """Length the model was pre-trained with, in tokens"""

    def __post_init__(self) -> None:
        check_types("model.yarn", self)
        if not self.factor >= 1:
            raise ValueError(f"model.yarn.factor is {self.factor}; allowed: at least 1")
        if not 0 < self.beta_slow <= self.beta_fast:
            raise ValueError(
                f"model.yarn: beta_slow {self.beta_slow} and beta_fast {self.beta_fast}; "
                "allowed: 0 < beta_slow <= beta_fast"
            )
        if self.original_length < 1:
            raise ValueError(
                f"model.yarn.original_length is {self.original_length}; allowed: at least 1"
            )


@dataclass(frozen=True)
class ParamCount:
    """Numbers of parameters, router biases included."""

    main: int
    """Main model"""
    mtp: int
    """MTP modules without their tied embedding and head"""
    activated: int
    """Used by one token in the main model, embedding table and head counted whole"""
    activated_no_embedding: int
    """The same without the embedding table, of which a token reads one row"""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a model.

    `ModelConfig()` is DeepSeek-V3 as pre-trained: 671B parameters, 4096 tokens.
    """

    vocab_size: int = 129280
    """V: rows of the embedding and of the head"""
    d_model: int = 7168
    """D: width of the residual stream"""
    num_layers: int = 61
    """Layers of the main model, dense and MoE"""
    num_dense_layers: int = 3
    """Leading layers with a dense feed-forward instead of experts"""
    num_heads: int = 128
    """H: attention heads"""
    q_latent: int | None = 1536
    """Q: width of the compressed query; None projects queries directly"""
    kv_latent: int = 512
    """C: width of the compressed keys and values, which is what the cache holds"""
    nope_dim: int = 128
    """N: size of a head's query and key without position"""
    rope_dim: int = 64
    """R: size of a head's rotary query and of the shared rotary key"""
    v_dim: int = 128
    """U: size of a head's value"""
    dense_hidden: int = 18432
    """F of the dense layers"""
    expert_hidden: int = 2048
    """F of one expert"""
    num_experts: int = 256
    """E: routed experts in a layer"""
    experts_per_token: int = 8
    """K: routed experts a token uses"""
    num_shared_experts: int = 1
    """Experts every token uses, held as one feed-forward of their total width"""
    num_groups: int = 8
    """G: expert groups, one per node in the report's job"""
    num_kept_groups: int = 4
    """Groups a token may use: the M of node-limited routing"""
    gate_scale: float = 2.5
    """Factor on the normalised gates (routed_scaling_factor)"""
    masked_score: Literal["-inf", "0"] = "-inf"
    """Score of experts in dropped groups; 0 is for parity with transformers 4"""
    balance_indicator: Literal["scores", "routed"] = "scores"
    """What the balance loss counts: top K of the plain scores (Eq. 18), or the routing itself"""
    mtp_depth: int = 1
    """Multi-token prediction modules"""
    tied_head: bool = False
    """Use the embedding as the output head"""
    max_length: int = 4096
    """Longest sequence, in tokens"""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies"""
    yarn: YarnConfig = field(default_factory=YarnConfig)
    """Context extension, active beyond yarn.original_length"""
    rms_eps: float = 1e-6
    """Epsilon of every RMSNorm but those on the latents"""
    latent_rms_eps: float = 1e-6
    """Epsilon of the norms on the latents: 1e-6 in released code, whatever rms_eps is"""
    init_std: float = 0.006
    """Standard deviation of the initial weights"""
    bos_id: int = 0
    """Id of the begin-of-sentence token"""
    eos_id: int = 1
    """Id of the end-of-sentence token"""

    def __post_init__(self) -> None:
        check_types("model", self)
        for name in _AT_LEAST_ONE:
            _at_least(name, getattr(self, name), 1)
        for name in ("num_dense_layers", "num_shared_experts", "mtp_depth", "bos_id", "eos_id"):
            _at_least(name, getattr(self, name), 0)
        if self.q_latent is not None:
            _at_least("q_latent", self.q_latent, 1)
        for name in get_type_hints(type(self)):
            _at_most(name, getattr(self, name), _AT_MOST.get(name, 2**31 - 1))
        if self.num_dense_layers > self.num_layers:
            raise ValueError(
                f"model.num_dense_layers is {self.num_dense_layers}; "
                f"allowed: at most num_layers = {self.num_layers}"
            )
        if self.rope_dim % 2:
            raise ValueError(
                f"model.rope_dim is {self.rope_dim}; allowed: even sizes (rotation pairs)"
            )
        for name in ("rope_theta", "rms_eps", "latent_rms_eps", "init_std", "gate_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"model.{name} is {getattr(self, name)}; allowed: positive numbers"
                )
        for name in ("bos_id", "eos_id"):
            if getattr(self, name) >= self.vocab_size:
                raise ValueError(
                    f"model.{name} is {getattr(self, name)}; "
                    f"allowed: less than vocab_size = {self.vocab_size}"
                )
        self._check_routing()

    def _check_routing(self) -> None:
        if self.num_experts % self.num_groups:
            raise ValueError(
                f"model.num_groups is {self.num_groups}, which does not divide "
                f"num_experts = {self.num_experts}"
            )
        if self.num_kept_groups > self.num_groups:
            raise ValueError(
                f"model.num_kept_groups is {self.num_kept_groups}; "
                f"allowed: at most num_groups = {self.num_groups}"
            )
        group = self.num_experts // self.num_groups
        if self.num_groups > 1 and group < 2:
            raise ValueError(
                f"model.num_groups is {self.num_groups} for {self.num_experts} experts; allowed: "
                f"at least 2 experts in a group (its score is the sum of the best two)"
            )
        kept = self.num_kept_groups * group
        if self.experts_per_token > kept:
            raise ValueError(
                f"model.experts_per_token is {self.experts_per_token}; allowed: at most {kept}, "
                f"the experts in {self.num_kept_groups} kept groups of {group}"
            )

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    @property
    def yarn_active(self) -> bool:
        """Pre-training at the original length uses plain RoPE, as the released inference code
        does.
        """
        return self.yarn.factor > 1 and self.max_length > self.yarn.original_length

    def param_count(self) -> ParamCount:
        """Exact numbers of parameters, in elements."""
        d = self.d_model
        qk = self.num_heads * (self.nope_dim + self.rope_dim)
        query = d * qk if self.q_latent is None else self.q_latent * (d + 1 + qk)
        key_value = (
            d * (self.kv_latent + self.rope_dim)
            + self.kv_latent
            + self.kv_latent * self.num_heads * (self.nope_dim + self.v_dim)
        )
        attention = query + key_value + self.num_heads * self.v_dim * d + 2 * d
        expert = 3 * d * self.expert_hidden
        router = self.num_experts * (d + 1)
        dense_layer = attention + 3 * d * self.dense_hidden
        shared = attention + router + self.num_shared_experts * expert
        moe_layer = shared + self.num_experts * expert
        active_layer = shared + self.experts_per_token * expert
        table = self.vocab_size * d
        ends = d + (table if self.tied_head else 2 * table)
        dense = self.num_dense_layers * dense_layer
        activated = dense + self.num_moe_layers * active_layer + ends
        return ParamCount(
            main=dense + self.num_moe_layers * moe_layer + ends,
            mtp=self.mtp_depth * (moe_layer + 2 * d * d + 3 * d),
            activated=activated,
            activated_no_embedding=activated if self.tied_head else activated - table,
        )

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "ModelConfig":
        """The config of a Hugging Face `config.json`.

        ValueError names what is missing or unsupported.
        """
        from dsv3_jax.config.hf import model_from_hf

        return model_from_hf(hf)

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers' `DeepseekV3ForCausalLM` reads."""
        from dsv3_jax.config.hf import model_to_hf

        return model_to_hf(self)


_AT_LEAST_ONE = (
    "vocab_size",
    "d_model",
    "num_layers",
    "num_heads",
    "kv_latent",
    "nope_dim",
    "rope_dim",
    "v_dim",
    "dense_hidden",
    "expert_hidden",
    "num_experts",
    "experts_per_token",
    "num_groups",
    "num_kept_groups",
    "max_length",
)


# What is gone through one by one. Other sizes and ids are int32.
_AT_MOST = {"num_layers": 10_000, "num_experts": 10_000, "mtp_depth": 16}


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"model.{name} is {shown(value)}; allowed: at least {least}")


def _at_most(name: str, value: Any, most: int) -> None:
    if type(value) is int and value > most:
        raise ValueError(f"model.{name} is {shown(value)}; allowed: at most {most}")
