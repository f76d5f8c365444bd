"""What a folder holds, told without loading a weight: Hugging Face's or a run's."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from dsv3_jax.checkpoint import store
from dsv3_jax.checkpoint.folder_tokenizer import open_tokenizer
from dsv3_jax.checkpoint.hf_check import Differences, check_count, differences, lack_of_mtp
from dsv3_jax.checkpoint.hf_folder import HFFolder, open_folder
from dsv3_jax.checkpoint.hf_table import abstract_model, copies, entries
from dsv3_jax.checkpoint.model_folder import find
from dsv3_jax.checkpoint.names import as_stored, shapes
from dsv3_jax.checkpoint.run_model import CHECKPOINTS
from dsv3_jax.checkpoint.tensor_file import CODES
from dsv3_jax.config import ModelConfig
from dsv3_jax.config.load import load_json
from dsv3_jax.model.router import RouterBias


class Stored(NamedTuple):
    """One tensor: name of its dtype, bytes."""

    dtype: str
    size: int


def inspect(path: Path) -> Iterator[str]:
    """Lines about a folder, of a run about its newest step or the one that the path names.

    ValueError or OSError if it is neither kind, or cannot be read.
    """
    place = find(path)
    return _hf_lines(open_folder(path)) if place.is_hf else _run_lines(place.folder, place.step)


def _hf_lines(folder: HFFolder) -> Iterator[str]:
    yield f"folder     {folder.path}: Hugging Face, {folder.config['model_type']}"
    quantization = folder.config.get("quantization_config")
    if isinstance(quantization, dict):
        described = ", ".join(f"{name} {value}" for name, value in quantization.items())
        yield f"quantised  {described}"
    files = len({tensor.file for tensor in folder.tensors.values()})
    specs = [tensor.spec for tensor in folder.tensors.values()]
    yield from _sizes(f"files: {files}", (Stored(CODES[s.dtype], s.size) for s in specs))
    try:
        cfg = folder.model_config()
        check_count(folder, cfg)
    except ValueError as error:
        yield f"model      not supported: {error}"
        yield _tokenizer_line(folder.path, None)
        return
    yield _model_line(cfg)
    yield _tokenizer_line(folder.path, cfg.vocab_size)
    if said := lack_of_mtp(folder, cfg):
        yield f"MTP        {said}"
    table = entries(cfg, nnx.split(abstract_model(cfg))[1])
    yield from _difference_lines(differences(folder, cfg, table, copies(cfg)))


def _run_lines(path: Path, step: int | None) -> Iterator[str]:
    cfg = load_json(path / "config.json").model
    steps = store.steps(path / CHECKPOINTS)
    yield f"folder     {path}: a run; checkpoints of steps: {', '.join(map(str, steps)) or 'none'}"
    yield _model_line(cfg)
    yield _tokenizer_line(path, cfg.vocab_size)
    if not steps:
        return
    damaged: list[str] = []
    step, groups = store.described(path / CHECKPOINTS, step, report=damaged.append)
    yield from (f"damaged    {line}" for line in damaged)
    yield f"step       {step}"
    for group, named in groups.items():
        yield from _sizes(group, (_stored(described) for described in named.values()))
    held = {**groups.get("params", {}), **groups.get("router_bias", {})}
    yield from _difference_lines(_run_differences(cfg, held))


def _run_differences(cfg: ModelConfig, held: Mapping[str, Mapping]) -> Differences:
    stored = {name: jax.ShapeDtypeStruct(d["shape"], d["dtype"]) for name, d in held.items()}
    dense, wanted = cfg.num_dense_layers, set()
    for state in nnx.split(abstract_model(cfg), nnx.Param, RouterBias)[1:]:
        wanted |= set(shapes(as_stored(state, stored, dense), dense))
    return Differences(sorted(wanted - set(held)), sorted(set(held) - wanted))


def _model_line(cfg: ModelConfig) -> str:
    count = cfg.param_count()
    return (
        f"model      {count.main / 1e6:,.1f} M parameters, {count.mtp / 1e6:,.1f} M of MTP; "
        f"{cfg.num_layers} layers, {cfg.num_dense_layers} of them dense; "
        f"{cfg.num_experts} experts, {cfg.experts_per_token} active"
    )


def _tokenizer_line(folder: Path, vocab_size: int | None) -> str:
    try:
        tokenizer = open_tokenizer(folder, vocab_size)
    except ValueError as error:
        return f"tokenizer  none that can be used: {error}"
    ids = f"{tokenizer.vocab_size:,} ids, begin {tokenizer.bos_id}, end {tokenizer.eos_id}"
    return f"tokenizer  {Path(tokenizer.name).name}, {ids}"


def _sizes(what: str, stored: Iterable[Stored]) -> Iterator[str]:
    count, size = Counter[str](), Counter[str]()
    for dtype, number in stored:
        count[dtype] += 1
        size[dtype] += number
    yield f"tensors    {count.total():,}, {size.total():,} bytes; {what}"
    for dtype in sorted(count):
        yield f"           {dtype:16} {count[dtype]:8,}  {size[dtype]:>20,} bytes"


def _difference_lines(found: Differences) -> Iterator[str]:
    yield f"missing    {_shown(found.missing)}"
    yield f"unknown    {_shown(found.unknown)}"


def _shown(names: Sequence[str]) -> str:
    if not names:
        return "none"
    return f"{len(names)}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"


def _stored(described: Mapping) -> Stored:
    dtype = np.dtype(described["dtype"])
    return Stored(described["dtype"], dtype.itemsize * math.prod(described["shape"]))
