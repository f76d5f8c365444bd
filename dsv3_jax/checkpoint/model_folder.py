"""A model and its tokenizer from a folder: a run's, an imported model's, or Hugging Face's."""

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.checkpoint.folder_tokenizer import check_ids, open_tokenizer
from dsv3_jax.checkpoint.hf import GENERATION, load_pretrained
from dsv3_jax.checkpoint.hf_check import lacks_mtp
from dsv3_jax.checkpoint.hf_folder import open_folder
from dsv3_jax.checkpoint.run_model import read_model
from dsv3_jax.config import ModelConfig
from dsv3_jax.config.fields import shown
from dsv3_jax.config.load import is_hf_config
from dsv3_jax.config.plain_json import read_json, read_table
from dsv3_jax.data.answers import AnswerTemplate
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.model.transformer import DeepSeekV3

_NEEDED = "needed: a run's folder, or a Hugging Face one"


class OpenedModel(NamedTuple):
    """What `open_model` returns."""

    model: DeepSeekV3
    tokenizer: Tokenizer
    cfg: ModelConfig
    step: int | None
    """Of the run; None for a Hugging Face folder"""
    end_ids: frozenset[int] = frozenset()
    """Those that end a text or, of a chat model, a turn"""


class Place(NamedTuple):
    """A folder with config.json, and the step that a path within it names."""

    folder: Path
    step: int | None
    is_hf: bool

    def chosen(self, step: int | None) -> int | None:
        """The step that an option or the path names. ValueError if they name two."""
        if None not in (step, self.step) and step != self.step:
            raise ValueError(
                f"{self.folder}: step {step} and step {self.step}; allowed: one of them"
            )
        return self.step if step is None else step


def open_model(
    path: str | Path,
    *,
    dtype: Any = None,
    step: int | None = None,
    average: bool = False,
    drafts: int = 0,
    mesh: jax.sharding.Mesh | None = None,
) -> OpenedModel:
    """The model of a run's folder, of its `checkpoints` or of one `step_...` in it, or of a Hugging
    Face folder.

    Args:
        dtype: of the weights; None is bfloat16 for a run's float32 masters, and what is stored for
            a Hugging Face folder. FP8 stays FP8 in a run's folder, and is expanded in the other.
        step: of a run; None takes the newest that is undamaged.
        average: take the run's moving average of the weights.
        drafts: MTP modules that are needed; if none are, those of a Hugging Face folder are not
            read.
        mesh: as of `load_pretrained`, for a Hugging Face folder; a run's model comes on one device.

    ValueError or OSError, one line, for what is missing, damaged, or not to be had together.
    """
    place = find(Path(path))
    tokenizer = open_tokenizer(place.folder)
    if place.is_hf:
        if step is not None or average:
            raise ValueError(f"{place.folder}: a Hugging Face folder has no steps and no average")
        _check_drafts(place.folder, drafts, _held_mtp(place.folder) if drafts else 0)
        opened = OpenedModel(*_pretrained(place.folder, dtype, tokenizer, drafts, mesh), None)
    else:
        opened = _of_run(place, tokenizer, dtype, step, average)
        _check_drafts(place.folder, drafts, opened.cfg.mtp_depth)
    check_ids(tokenizer, opened.cfg.vocab_size)
    return opened._replace(end_ids=_end_ids(place.folder, opened))


def _end_ids(folder: Path, opened: OpenedModel) -> frozenset[int]:
    """Of the configuration, the tokenizer, the chat template, and generation_config.json, which may
    have several.
    """
    known, file = {opened.cfg.eos_id, opened.tokenizer.eos_id}, folder / GENERATION
    with contextlib.suppress(ValueError, OSError):  # told to those who ask for a conversation
        known |= AnswerTemplate.of_folder(folder, opened.tokenizer).ends()
    if not file.exists():
        return frozenset(known)
    content = read_table(file)
    found = content.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    size = opened.cfg.vocab_size
    if not all(type(i) is int and 0 <= i < size for i in ids):
        raise ValueError(
            f"{file}: eos_token_id is {shown(found)}; allowed: ids from 0 to {size - 1}"
        )
    return frozenset(known | set(ids))


def find(path: Path) -> Place:
    """ValueError if there is no model's configuration, in the folder or above its checkpoints."""
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; {_NEEDED}")
    path = path.resolve()
    for folder in (path, path.parent, path.parent.parent):
        if (folder / "config.json").is_file():
            break
    else:
        raise ValueError(f"{path}: no config.json there; {_NEEDED}")
    name = path.name.removeprefix("step_").removesuffix(".old")
    within = folder != path and path.name.startswith("step_") and name.isdecimal()
    if folder != path and not (within or path.name == "checkpoints"):
        raise ValueError(f"{path}: no config.json there; {_NEEDED}")
    return Place(folder, int(name) if within else None, _is_hf(folder / "config.json"))


def _is_hf(config: Path) -> bool:
    try:
        return is_hf_config(read_json(config))
    except ValueError as error:
        raise ValueError(f"{config} is not JSON: {error}") from None


def _held_mtp(folder: Path) -> int:
    """MTP modules of a Hugging Face folder; none where config.json alone speaks of them."""
    found = open_folder(folder)
    cfg = found.model_config()
    return 0 if lacks_mtp(found, cfg) else cfg.mtp_depth


def _check_drafts(folder: Path, drafts: int, modules: int) -> None:
    if drafts > modules:
        raise ValueError(
            f"{drafts} drafts a step; allowed: 0 to {modules}, the MTP modules in {folder}"
        )


def _pretrained(
    folder: Path, dtype: Any, tokenizer: Tokenizer, drafts: int, mesh: jax.sharding.Mesh | None
) -> tuple:
    shown = sys.stderr.isatty()
    model = load_pretrained(folder, dtype, mesh, skip_mtp=not drafts, progress=shown)
    stated = read_json(folder / "config.json")
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    ids = {name: i for name, i in ids.items() if stated.get(f"{name[:3]}_token_id") is None}
    return model, tokenizer, replace(model.cfg, **ids)


def _of_run(
    place: Place, tokenizer: Tokenizer, dtype: Any, step: int | None, average: bool
) -> OpenedModel:
    step = place.chosen(step)
    model, cfg, step = read_model(place.folder, step, average, dtype=dtype or jnp.bfloat16)
    return OpenedModel(model, tokenizer, cfg.model, step)
