"""How the arrays of a pipelined run are numbered, from its configuration alone."""

from dsv3_jax.checkpoint.names import Numbering, StageNumbers
from dsv3_jax.config import RunConfig
from dsv3_jax.plan.cuts import cuts_of


def numbering_of(cfg: RunConfig) -> Numbering:
    """By which arrays of a state have their layers' names."""
    dense = cfg.model.num_dense_layers
    if cfg.mesh.pipe == 1:
        return dense
    return tuple(
        StageNumbers(c.first_layer, max(c.first_layer, dense), c.first_mtp) for c in cuts_of(cfg)
    )
