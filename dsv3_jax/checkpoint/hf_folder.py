"""A Hugging Face folder as it lies on disk: its configuration and where each tensor is.

Only headers are read. Every inconsistency of a folder is one line: a file that is missing or cut
off, an index that disagrees with the files.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsv3_jax.checkpoint.hf_table import is_mtp
from dsv3_jax.checkpoint.tensor_file import Tensor, read_header
from dsv3_jax.config import ModelConfig
from dsv3_jax.config.fields import shown
from dsv3_jax.config.load import is_hf_config
from dsv3_jax.config.plain_json import read_json, read_table

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class HFFolder:
    """What a folder holds."""

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]

    def model_config(self, skip_mtp: bool = False) -> ModelConfig:
        """ValueError names what the folder's config.json asks for and we do not support."""
        try:
            cfg = ModelConfig.from_hf(self.config)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        return replace(cfg, mtp_depth=0) if skip_mtp else cfg

    def without_mtp(self, num_layers: int) -> "HFFolder":
        """The same folder without tensors of layers after the main model's last."""
        kept = {n: t for n, t in self.tensors.items() if not is_mtp(n, num_layers)}
        return replace(self, tensors=kept)


def is_hf_folder(path: Path) -> bool:
    """Whether a folder's config.json is Hugging Face's."""
    try:
        return is_hf_config(read_json(path / "config.json"))
    except (OSError, ValueError):
        return False


def open_folder(path: str | Path) -> HFFolder:
    """Reads configuration, index and headers. ValueError or OSError, one line, where they fail."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; needed: a Hugging Face folder")
    config = read_table(path / "config.json")
    if not is_hf_config(config):
        raise ValueError(f"{path / 'config.json'} has no model_type: not of Hugging Face")
    return HFFolder(path, config, _tensors(path))


def _tensors(path: Path) -> dict[str, Tensor]:
    if not os.path.lexists(path / INDEX):  # a link to nothing is a fault of its own
        if not os.path.lexists(path / SINGLE):
            raise ValueError(f"{path} holds neither {INDEX} nor {SINGLE}")
        return read_header(path / SINGLE)
    file_of = read_table(path / INDEX).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(f, str) for f in file_of.values()):
        raise ValueError(f"{path / INDEX}: no weight_map of names to files")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(file_of.values())):
        if Path(file).name != file or file in ("", ".."):
            raise ValueError(f"{path / INDEX} names {shown(file)}; allowed: files of this folder")
        if not (path / file).exists():
            raise ValueError(f"{path / INDEX} names {file}, which is missing")
        found = read_header(path / file)
        for name in found:
            if file_of.get(name) != file:
                raise ValueError(f"{path / file} holds {name}, which the index places elsewhere")
        tensors |= found
    absent = sorted(set(file_of) - set(tensors))
    if absent:
        raise ValueError(
            f"{path / INDEX} places {absent[0]} in {file_of[absent[0]]}, which does not hold it "
            f"({len(absent)} such in all)"
        )
    return tensors
