"""Whether a folder's tensors are those of the model its configuration names."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dsv3_jax.checkpoint.hf_folder import HFFolder
from dsv3_jax.checkpoint.hf_table import SCALES, Copy, Entry, entry_count, is_mtp, leftover
from dsv3_jax.checkpoint.tensor_file import CODES, DTYPES, Tensor
from dsv3_jax.config import ModelConfig
from dsv3_jax.quant.fp8 import grid

FP8 = DTYPES["F8_E4M3"]
PLAIN = tuple(DTYPES[code] for code in ("BF16", "F16", "F32"))
_MOST_MISSING = 200_000  # twice what DeepSeek-V3 has
_CHUNK = 2**24  # bytes compared at a time


class Differences(NamedTuple):
    """Between the table and a folder's names."""

    missing: list[str]
    unknown: list[str]


def check_count(folder: HFFolder, cfg: ModelConfig) -> None:
    """ValueError for a model so far beyond the folder that to name what is missing takes minutes.

    Before anything that goes through the model's tensors one by one.
    """
    needed, held = entry_count(cfg), len(folder.tensors)
    if needed > held + _MOST_MISSING:
        raise ValueError(
            f"{folder.path}: config.json describes a model of {needed:,} tensors "
            f"({cfg.num_layers:,} layers, {cfg.num_experts:,} experts, {cfg.mtp_depth:,} MTP "
            f"modules), and the folder holds {held:,}"
        )


def differences(
    folder: HFFolder, cfg: ModelConfig, table: Sequence[Entry], repeated: Sequence[Copy]
) -> Differences:
    """Names that the model needs and the folder lacks, and the reverse. Copies may be absent."""
    known = {entry.hf for entry in table} | {copy.hf for copy in repeated}
    stored = folder.tensors
    linears = (e.hf for e in table if e.kind == "linear" and e.hf in stored)
    scales = {name + SCALES for name in linears if is_fp8(stored[name])}
    missing = sorted(({e.hf for e in table} | scales) - set(stored))
    # Transformers writes tensors without elements for shared experts that a model has not.
    filled = [name for name, tensor in stored.items() if tensor.spec.size]
    return Differences(missing, leftover(filled, known | scales))


def lacks_mtp(folder: HFFolder, cfg: ModelConfig) -> bool:
    """Whether the configuration has MTP modules, and the folder not one tensor of them."""
    return bool(cfg.mtp_depth) and not any(is_mtp(n, cfg.num_layers) for n in folder.tensors)


def lack_of_mtp(folder: HFFolder, cfg: ModelConfig) -> str:
    """What to do where not one tensor of the MTP modules is there; empty where some are."""
    if not lacks_mtp(folder, cfg):
        return ""
    return (
        f"config.json has num_nextn_predict_layers {cfg.mtp_depth}, but there is no tensor "
        f"model.layers.{cfg.num_layers}.*; --skip-mtp (skip_mtp=True; train: --model.mtp-depth 0) "
        "takes the main model alone"
    )


def check_names(folder: HFFolder, found: Differences, cfg: ModelConfig) -> None:
    """ValueError lists what is missing or unknown: the first few and the count."""
    if said := lack_of_mtp(folder, cfg):
        raise ValueError(f"{folder.path}: {said}")
    for what, names in (("lacks tensors", found.missing), ("has unknown tensors", found.unknown)):
        if names:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise ValueError(f"{folder.path} {what}, {len(names)} in all: {shown}")


def check_tensors(folder: HFFolder, table: Sequence[Entry], repeated: Sequence[Copy]) -> None:
    """ValueError for a shape, a dtype, scales or a copy that do not fit. Reads scales, copies."""
    for entry in table:
        tensor = folder.tensors[entry.hf]
        allowed = (*PLAIN, FP8) if entry.kind == "linear" else PLAIN
        _check_spec(entry.hf, tensor, entry.shape, allowed)
        if is_fp8(tensor):
            scales = folder.tensors[entry.hf + SCALES]
            _check_spec(entry.hf + SCALES, scales, grid(entry.shape), (DTYPES["F32"],))
            if not np.isfinite(scales.read()).all():
                raise ValueError(f"{scales.file}: {entry.hf + SCALES} holds NaN or infinity")
    for copy in repeated:
        if copy.hf in folder.tensors:
            _check_copy(copy, folder.tensors[copy.hf], folder.tensors[copy.of])


def is_fp8(tensor: Tensor) -> bool:
    return tensor.spec.dtype == FP8


def _check_spec(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[np.dtype, ...]
) -> None:
    if tensor.spec.shape != shape:
        raise ValueError(
            f"{tensor.file}: {name} has shape {list(tensor.spec.shape)}; the model needs "
            f"{list(shape)}"
        )
    if tensor.spec.dtype not in dtypes:
        raise ValueError(
            f"{tensor.file}: {name} has dtype {CODES[tensor.spec.dtype]}; allowed: "
            f"{', '.join(CODES[dtype] for dtype in dtypes)}"
        )


def _check_copy(copy: Copy, repeated: Tensor, main: Tensor) -> None:
    """Bit for bit where dtypes agree, else by value."""
    same = repeated.spec.shape == main.spec.shape and repeated.spec.dtype in PLAIN
    if same:
        one, two = repeated.read(), main.read()
        rows = max(1, _CHUNK // max(1, one[:1].nbytes))
        starts = range(0, len(one), rows)
        same = all(_equal(one[i : i + rows], two[i : i + rows]) for i in starts)
    if not same:
        raise ValueError(
            f"{repeated.file}: {copy.hf} ({repeated.spec}) differs from {copy.of} ({main.spec}), "
            "of which it must be a copy"
        )


def _equal(one: np.ndarray, two: np.ndarray) -> bool:
    if one.dtype == two.dtype:
        return np.array_equal(_bits(one), _bits(two))
    wide = jnp.promote_types(one.dtype, two.dtype)
    return np.array_equal(one.astype(wide), two.astype(wide))


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8)
