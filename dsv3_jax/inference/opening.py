"""What commands open for an engine: devices, and a folder's model with its weights laid out."""

from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from dsv3_jax import process
from dsv3_jax.checkpoint.model_folder import OpenedModel, open_model
from dsv3_jax.cli import to_stderr
from dsv3_jax.inference.options import EngineOptions
from dsv3_jax.inference.weights import Weights, lay_out
from dsv3_jax.parallel.mesh import make_mesh


class Opened(NamedTuple):
    """A model to be served."""

    weights: Weights
    mesh: Mesh | None
    """None for one device"""
    folder: OpenedModel
    """Without its model"""


def open_weights(
    checkpoint: Path,
    options: EngineOptions,
    *,
    step: int | None = None,
    average: bool = False,
    dtype: str | None = None,
) -> Opened:
    """As `open_model`, whose errors it has, and those of devices. Tells stderr what it is."""
    mesh = _mesh(options)
    opened = open_model(
        checkpoint, dtype=dtype, step=step, average=average, drafts=options.drafts, mesh=mesh
    )
    options.mesh_config().check_model(opened.cfg)
    to_stderr(f"{checkpoint}" + ("" if opened.step is None else f", step {opened.step:,}"))
    weights = lay_out(opened.model, consume=True, drafts=options.drafts)
    return Opened(weights, mesh, opened._replace(model=None))


def _mesh(options: EngineOptions) -> Mesh | None:
    process.check_devices()
    cfg = options.mesh_config()
    idle = (options.devices or 0) - cfg.size
    if idle > 0:
        to_stderr(f"warning: {idle} of {options.devices} devices are idle: see --mesh")
    return make_mesh(cfg) if cfg.size > 1 else None
