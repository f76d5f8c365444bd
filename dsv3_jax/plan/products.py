"""The matrix products of a model, item by item of what pipelines cut it into (report 2.1, 3.3.1).

What FLOPs, times and weights are all counted from. Gate and up are one product, and so are the two
down-projections of MLA that read the same input.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dsv3_jax.config import ModelConfig
from dsv3_jax.parallel.stages import Cut


@dataclass(frozen=True)
class Product:
    """[rows, inner] × [inner, columns], `copies` rows for a token."""

    name: str
    inner: int
    columns: int
    copies: int = 1
    """K for the routed experts, else 1"""
    low: bool = True
    """Whether an FP8 recipe takes it (report 3.3.1: not the gate, the head and MTP's projection)"""
    weights: int = 1
    """Matrices of that size: E for the routed experts"""
    at_once: bool = False
    """Whether its gradients are made in F: the head's, while logits are there"""

    @property
    def flops(self) -> int:
        """Per token, forward."""
        return 2 * self.copies * self.inner * self.columns

    @property
    def routed(self) -> bool:
        return self.weights > 1

    @property
    def parameters(self) -> int:
        return self.weights * self.inner * self.columns


@dataclass(frozen=True)
class Item:
    """One of: embedding, a layer, head, an MTP module."""

    name: str
    products: tuple[Product, ...]
    attends: bool = False
    exchanges: bool = False
    """Whether tokens go to experts"""
    table: int = 0
    """Parameters that are looked up and not multiplied with"""


def attention_products(model: ModelConfig) -> tuple[Product, ...]:
    """Projections of MLA."""
    d, heads = model.d_model, model.num_heads
    latent = model.kv_latent + model.rope_dim
    queries = heads * (model.nope_dim + model.rope_dim)
    if model.q_latent is None:
        down = (Product("kv down", d, latent), Product("q", d, queries))
    else:
        down = (
            Product("q and kv down", d, model.q_latent + latent),
            Product("q up", model.q_latent, queries),
        )
    return (
        *down,
        Product("kv up", model.kv_latent, heads * (model.nope_dim + model.v_dim)),
        Product("attention output", heads * model.v_dim, d),
    )


def scores_flops(model: ModelConfig, length: int) -> int:
    """Of core attention per token, forward, in rows of `length` tokens, causal."""
    return 2 * (length // 2) * model.num_heads * (model.nope_dim + model.rope_dim + model.v_dim)


def dense_layer(model: ModelConfig) -> Item:
    """A layer of the first ones."""
    ffn = _swiglu("dense", model.d_model, model.dense_hidden)
    return Item("dense layer", (*attention_products(model), *ffn), attends=True)


def moe_layer(model: ModelConfig) -> Item:
    """A layer with experts."""
    d, hidden = model.d_model, model.expert_hidden
    products = [*attention_products(model), Product("gate", d, model.num_experts, low=False)]
    if model.num_shared_experts:
        products += _swiglu("shared expert", d, hidden * model.num_shared_experts)
    products += _swiglu("experts", d, hidden, model.experts_per_token, model.num_experts)
    return Item("MoE layer", tuple(products), attends=True, exchanges=True)


def items_of(model: ModelConfig) -> list[Item]:
    """Embedding, every layer, head, every MTP module with its pass through the head."""
    d = model.d_model
    head = Product("head", d, model.vocab_size, low=False, at_once=True)
    moe = moe_layer(model)
    mtp = (Product("MTP projection", 2 * d, d, low=False), *moe.products, head)
    return [
        Item("embedding", (), table=model.vocab_size * d),
        *[dense_layer(model)] * model.num_dense_layers,
        *[moe] * model.num_moe_layers,
        Item("head", (head,)),
        *[Item("MTP module", mtp, attends=True, exchanges=True)] * model.mtp_depth,
    ]


def items_in(model: ModelConfig, cut: Cut) -> list[Item]:
    """Those of one stage."""
    items, layers = items_of(model), range(cut.first_layer, cut.end_layer)
    embedding, head = items[0], items[1 + model.num_layers]
    modules = items[2 + model.num_layers :][cut.first_mtp : cut.end_mtp]
    here = [embedding] * cut.embed + [items[1 + layer] for layer in layers]
    return here + [head] * cut.head + modules


def _swiglu(name: str, d: int, hidden: int, copies: int = 1, weights: int = 1) -> Iterator[Product]:
    yield Product(f"{name}: gate and up", d, 2 * hidden, copies, weights=weights)
    yield Product(f"{name}: down", hidden, d, copies, weights=weights)
