"""Models in run folders: those that a run trained, and those imported from elsewhere.

An imported model lies in a folder like a run's, with one checkpoint, of step 0, which holds
weights and router biases and no optimiser: a run may start from it and cannot be resumed from it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from dsv3_jax.checkpoint import store
from dsv3_jax.checkpoint.arrays import CheckpointError
from dsv3_jax.checkpoint.folder_tokenizer import open_tokenizer
from dsv3_jax.checkpoint.hf import copy_tokenizer
from dsv3_jax.checkpoint.hf_folder import is_hf_folder
from dsv3_jax.checkpoint.hf_table import abstract_model
from dsv3_jax.checkpoint.names import as_stored, from_layers, to_layers
from dsv3_jax.checkpoint.new_folder import new_folder
from dsv3_jax.cli import to_stderr
from dsv3_jax.config import RunConfig
from dsv3_jax.config.load import imported_run
from dsv3_jax.config.run import from_dict
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.model.router import RouterBias
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.quant.fp8 import Blocked

CHECKPOINTS = "checkpoints"


class RunModel(NamedTuple):
    """A model out of a run's checkpoint."""

    model: DeepSeekV3
    cfg: RunConfig
    step: int


def read_model(
    run: Path,
    step: int | None = None,
    average: bool = False,
    report: Callable[[str], None] = to_stderr,
    dtype: Any = None,
) -> RunModel:
    """The weights of a step (default: the newest), or their average.

    They are in `dtype`, or as stored; FP8 and the router biases are as stored in any case.
    CheckpointError or ValueError, one line, for what is not there or does not fit.
    """
    if average:
        _check_average(run, step)
    weights = "average" if average else "params"
    groups = (weights, "router_bias")
    checkpoint = store.load(run / CHECKPOINTS, step, groups=groups, report=report)
    cfg = from_dict(RunConfig, checkpoint.meta["config"])
    graphdef, params, biases = nnx.split(abstract_model(cfg.model), nnx.Param, RouterBias)
    dense = cfg.model.num_dense_layers
    named = checkpoint.arrays
    states = (
        from_layers(_held(like, named[group], dense, to), named[group], dense)
        for like, group, to in ((params, weights, dtype), (biases, "router_bias", None))
    )
    return RunModel(nnx.merge(graphdef, *states), cfg, checkpoint.step)


def _check_average(run: Path, step: int | None) -> None:
    """ValueError if it is not damage for which no average can be read."""
    step, groups = store.described(run / CHECKPOINTS, step, report=lambda line: None)
    if "average" not in groups:
        raise ValueError(
            f"{run}: step {step} holds no average of the weights; allowed: steps of a run whose "
            "optimizer.ema_decay is above 0"
        )


def _held(like: nnx.State, named: Mapping[str, Any], dense: int, dtype: Any) -> nnx.State:
    """`like` in the dtypes in which its values are to be held."""
    stored = as_stored(like, named, dense)
    if dtype is None:
        return stored

    def cast(value: jax.ShapeDtypeStruct | Blocked) -> jax.ShapeDtypeStruct | Blocked:
        return value if isinstance(value, Blocked) else jax.ShapeDtypeStruct(value.shape, dtype)

    return nnx.map_state(lambda path, x: x.replace(cast(x.get_value())), stored)


def write_model(model: DeepSeekV3, source: Path, out: Path, *, overwrite: bool) -> None:
    """A model from a Hugging Face folder as an imported one, its tokenizer beside it.

    ValueError for a path that is in use, OSError for a full disk; nothing is then left behind.
    """
    checkpoint = as_checkpoint(model, source)
    size = sum(x.nbytes for named in checkpoint.arrays.values() for x in named.values())
    with new_folder(out, size + 2**20, overwrite) as folder:
        copy_tokenizer(source, folder)
        tokenizer = _usable_tokenizer(source)
        if tokenizer and not (folder / "tokenizer.json").exists():
            tokenizer.save(folder / "tokenizer.json")
        store.save(folder / CHECKPOINTS, checkpoint.step, checkpoint.arrays, checkpoint.meta)
        config = json.dumps(checkpoint.meta["config"], indent=2)
        (folder / "config.json").write_text(f"{config}\n", encoding="utf-8")


def as_checkpoint(model: DeepSeekV3, source: Path) -> store.Checkpoint:
    """A model from elsewhere as the checkpoint of step 0 of a run that never trained."""
    dense = model.cfg.num_dense_layers
    _, params, biases = nnx.split(model, nnx.Param, RouterBias)
    arrays = {"params": to_layers(params, dense), "router_bias": to_layers(biases, dense)}
    tokenizer = _usable_tokenizer(source)
    meta = {
        "config": json.loads(imported_run(model.cfg).to_json()),
        "data": {"tokenizer": tokenizer and tokenizer.content_hash},
        "imported_from": str(source),
    }
    return store.Checkpoint(0, arrays, meta)


def without_mtp(checkpoint: store.Checkpoint) -> store.Checkpoint:
    """The same model without its MTP modules."""
    arrays = {
        group: {name: x for name, x in named.items() if not name.startswith("mtp.")}
        for group, named in checkpoint.arrays.items()
    }
    config = checkpoint.meta["config"]
    config = config | {"model": config["model"] | {"mtp_depth": 0}}
    return replace(checkpoint, arrays=arrays, meta=checkpoint.meta | {"config": config})


def _usable_tokenizer(source: Path) -> Tokenizer | None:
    """None where there is no tokenizer that we could use; the weights can be had without."""
    try:
        return open_tokenizer(source)
    except ValueError:
        return None


def check_trained(run: Path) -> None:
    """CheckpointError if a folder holds a model from elsewhere, which nothing can resume."""
    if is_hf_folder(run):
        raise CheckpointError(
            f"--resume {run}: a Hugging Face folder; --init-from {run} starts a new run from it"
        )
    if _is_imported(run):
        raise CheckpointError(
            f"--resume {run}: an imported model, without an optimiser's state; "
            f"--init-from {run} starts a new run from it"
        )


def check_moments(run: Path) -> None:
    """CheckpointError if a folder holds a model from elsewhere, without an optimiser's state."""
    if is_hf_folder(run) or _is_imported(run):
        raise CheckpointError(f"--init-moments: {run} has none; allowed: a run that was trained")


def _is_imported(run: Path) -> bool:
    if not store.steps(run / CHECKPOINTS):
        return False
    meta = store.load(run / CHECKPOINTS, groups=(), report=lambda line: None).meta
    return "imported_from" in meta
