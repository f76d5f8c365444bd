"""Whether a checkpoint is of this run, or of this model: what may differ, and what may not."""

import dataclasses
from collections.abc import Collection
from typing import Any

from dsv3_jax.config import RunConfig
from dsv3_jax.config.run import from_dict
from dsv3_jax.data.corpus import Corpus

IDS = ("bos_id", "eos_id")  # the tokenizer decides them


def check_same_model(cfg: RunConfig, meta: dict[str, Any]) -> None:
    """ValueError if weights are of a model of another shape. The context may be another: its
    length, and YaRN, which is no part of the weights.
    """
    before = from_dict(RunConfig, meta["config"])
    differ = differences("model", cfg.model, before.model, keep={"max_length", "yarn", *IDS})
    if differ:
        raise ValueError(f"--init-from: another model: {'; '.join(differ)}")


def check_same_run(cfg: RunConfig, meta: dict[str, Any]) -> None:
    """A resumed run keeps model, data and seed; ValueError names what differs."""
    before = from_dict(RunConfig, meta["config"])
    differ = differences("model", cfg.model, before.model, keep=IDS)
    differ += differences(
        "data", cfg.data, before.data, keep={"readers", "source"}
    )  # contents count
    if cfg.train.seed != before.train.seed:
        differ.append(f"train.seed is {cfg.train.seed}, was {before.train.seed}")
    if differ:
        raise ValueError(f"--resume: this is another run: {'; '.join(differ)}")
    if cfg.train.steps < meta["step"]:
        raise ValueError(
            f"--resume: train.steps is {cfg.train.steps}; "
            f"allowed: at least {meta['step']}, where the run stands"
        )


def check_same_text(cfg: RunConfig, corpus: Corpus, meta: dict[str, Any]) -> None:
    """ValueError if tokenizer or text of a resumed run are not what they were."""
    source, was = cfg.data.source, from_dict(RunConfig, meta["config"]).data.source
    differ = []
    if meta["data"]["tokenizer"] != corpus.tokenizer.content_hash:
        differ.append("the tokenizer differs")
    if meta["data"]["content"] != corpus.content_hash:
        changed = f"data.source is {source}, was {was}, and holds other text"
        differ.append(changed if source != was else f"the text of data.source {source} has changed")
    if differ:
        raise ValueError(f"--resume: this is another run: {'; '.join(differ)}")


def differences(section: str, new: Any, old: Any, keep: Collection[str] = ()) -> list[str]:
    """What differs between two configurations, a phrase for each field that is not in `keep`."""
    return [
        f"{section}.{field.name} is {getattr(new, field.name)}, was {getattr(old, field.name)}"
        for field in dataclasses.fields(new)
        if field.name not in keep and getattr(new, field.name) != getattr(old, field.name)
    ]
