"""What results come from: the weights, the versions, the machine."""

import hashlib
import importlib.metadata
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from dsv3_jax import __version__
from dsv3_jax.checkpoint.listing import MARKER, committed
from dsv3_jax.checkpoint.model_folder import OpenedModel, find
from dsv3_jax.checkpoint.run_model import CHECKPOINTS
from dsv3_jax.cli import to_stderr
from dsv3_jax.inference.weights import Weights

_TOLD = 10e9  # bytes whose hash takes a while
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "tokenizers", "lm_eval", "datasets")


def checkpoint_of(path: Path, opened: OpenedModel, weights: Weights) -> dict[str, Any]:
    """Its folder's name, step, a hash of what is stored, and how it was held."""
    folder = find(path).folder
    return {
        "name": folder.name if opened.step is None else f"{folder.name}, step {opened.step}",
        "folder": str(path),
        "step": opened.step,
        "hash": _run_hash(folder, opened.step) if opened.step is not None else _hf_hash(folder),
        "dtype": str(weights.rest.embed_VD.dtype),
        "parameters": opened.cfg.param_count().main,
        "max_length": opened.cfg.max_length,
        "tokenizer": opened.tokenizer.content_hash,
    }


def versions() -> dict[str, str]:
    """Of Python, this project and what it computes with, as far as it is installed."""
    found = {"python": platform.python_version(), "dsv3_jax": __version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"backend": jax.default_backend()}


def _run_hash(folder: Path, step: int) -> str:
    """The marker holds the checksum of the manifest, which holds those of all tensors."""
    marker = committed(folder / CHECKPOINTS)[step] / MARKER
    return f"crc32 of the manifest {marker.read_text().strip()}"


def _hf_hash(folder: Path) -> str:
    """SHA-256 over those of the files of tensors, in the order of their names."""
    files = sorted(folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    if size > _TOLD:
        to_stderr(f"hashing {size / 1e9:,.0f} GB of weights")
    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(_file_hash, files))
    return f"sha256 {hashlib.sha256(b''.join(digests)).hexdigest()}"


def _file_hash(file: Path) -> bytes:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()
