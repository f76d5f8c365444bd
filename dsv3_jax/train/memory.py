"""Whether a model's training state fits at all, before anything is read or made."""

import jax
import jax.numpy as jnp

from dsv3_jax.config import RunConfig
from dsv3_jax.train.machine import memory_size

MASTER = GRADIENT = 4  # bytes of a parameter


def state_bytes(cfg: RunConfig) -> int:
    """Of masters, moments and gradients on one device, whatever the batch; on a mesh also of the
    weights that a step gathers, whole but for the experts of other devices. In a pipeline as if
    stages were of one size.
    """
    model, mesh = cfg.model, cfg.mesh
    count = model.param_count()
    params, stored = (
        count.main + count.mtp,
        MASTER + 2 * jnp.dtype(cfg.optimizer.moment_dtype).itemsize,
    )
    if mesh.size == 1:
        return params * (stored + GRADIENT)
    layers = model.num_moe_layers + model.mtp_depth
    experts = layers * model.num_experts * 3 * model.d_model * model.expert_hidden
    computed = params - experts + experts // mesh.expert_shards
    whole = params * stored // mesh.token_shards
    if mesh.pipe == 1:
        return whole + computed * (MASTER + GRADIENT)
    copies = 2 if cfg.pipeline.schedule == "dualpipe" else 1
    weight = jnp.dtype(cfg.train.dtype).itemsize  # stages compute with weights already cast
    return (whole + copies * computed * (weight + GRADIENT)) // mesh.pipe


def check_memory(cfg: RunConfig) -> None:
    """ValueError if the model cannot be trained here."""
    needed, count = state_bytes(cfg), cfg.model.param_count()
    place, gathered = "device", " and gathered weights" if cfg.mesh.size > 1 else ""
    if jax.default_backend() == "cpu":
        place, needed = "machine", needed * cfg.mesh.size  # whose memory emulated devices share
    if needed > memory_size():
        raise ValueError(
            f"the model has {(count.main + count.mtp) / 1e9:,.1f} B parameters, whose masters, "
            f"moments and gradients{gathered} take {needed / 1e9:,.0f} GB; this {place} has "
            f"{memory_size() / 1e9:,.0f} GB (--print-config only shows the configuration)"
        )
