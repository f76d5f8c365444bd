"""What servers of serve_cpu.py open: a model in a Hugging Face folder, a run's or of random
weights, and the text that prompts are pieces of.
"""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from contenders.dsv3_model import model_of
from contenders.serving import own_source
from contenders.side_by_side import ROOT

from dsv3_jax.checkpoint.hf import save_pretrained
from dsv3_jax.config import ModelConfig
from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

SETTINGS = "tokenizer_config.json"


def write_folder(folder: Path, model: ModelConfig, run: Path | None) -> None:
    """In float32. Random weights of `model` come with a tokenizer of this project's source."""
    source = run or folder.with_name("tokenizer")
    if run is None:
        source.mkdir()
        train_tokenizer(_texts(), model.vocab_size).save(source / "tokenizer.json")
    tokenizer = load_tokenizer(source / "tokenizer.json")
    made = model_of({"model": dataclasses.asdict(model), "run": run})
    if run is None:
        head_DV = silenced(np.asarray(made.head_DV[...]), tokenizer)
        made.head_DV.set_value(jnp.asarray(head_DV))
    save_pretrained(made, folder, dtype="float32", tokenizer_from=source, progress=False)
    if not (folder / SETTINGS).exists():
        _say_what_ends(folder / SETTINGS, tokenizer)


def _texts() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("dsv3_jax/**/*.py"))]


def silenced(head_DV: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Random weights of a head that write no token that ends a text, and none that is no text by
    itself, whose bytes a server keeps back until their character is whole: such tokens have a logit
    of 0, and of thousands of others one is above that.
    """
    data = [*tokenizer.token_bytes, *[b""] * (head_DV.shape[1] - tokenizer.vocab_size)]
    is_text_V = np.array([_is_text(one) for one in data])
    return np.where(is_text_V, head_DV, 0)


def _is_text(data: bytes) -> bool:
    return bool(data) and "\ufffd" not in data.decode(errors="replace")


def _say_what_ends(file: Path, tokenizer: Tokenizer) -> None:
    """To transformers, which knows no tokens by their usual names."""
    names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    settings = {name: tokenizer.spelling_of(token_id) for name, token_id in names.items()}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(settings), encoding="utf-8")


def write_text(folder: Path, file: Path) -> None:
    """Tokens of some of this project's source as a model's tokenizer has them: `ids`, and `pieces`
    of text; without those that are a part of a character.
    """
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    found = own_source(folder / "tokenizer.json")
    ids = [one for one in found if _is_text(tokenizer.token_bytes[one])]
    pieces = [tokenizer.decode([one]) for one in ids]
    file.write_text(json.dumps({"ids": ids, "pieces": pieces}), encoding="utf-8")
