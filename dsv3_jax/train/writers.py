"""TensorBoard and Weights & Biases as further readers of a run's records; both optional.

They take the records that go to `metrics.jsonl`: numbers of "train" and "validation" as scalars by
step (consumed tokens are one of them), "sample" and "event" as text. Other kinds are for the page.
"""

import dataclasses
import importlib
import math
from collections.abc import Iterator
from html import escape
from textwrap import indent
from types import ModuleType
from typing import Any, Protocol

from dsv3_jax.config import RunConfig
from dsv3_jax.files import replace_file
from dsv3_jax.train.folder import RunFolder

SCALARS = ("train", "validation")
TENSORBOARD = "tensorboard"  # the folder of event files within a run's
WANDB_ID = "wandb_id.txt"  # by which a resumed run goes on in the same place


class Writer(Protocol):
    """Somewhere else that a run's records go to."""

    def write(self, record: dict[str, Any]) -> None:
        """Takes one record of `metrics.jsonl`; ignores kinds that it does not show."""

    def close(self) -> None:
        """Writes what is left."""


def open_writers(cfg: RunConfig, run: RunFolder, resume_step: int | None = None) -> list[Writer]:
    """The writers that `cfg.output` asks for. `resume_step`: steps that a resumed run goes on from;
    what TensorBoard holds of later steps is hidden.

    ValueError if a package is missing or a project cannot be logged to.
    """
    tensorboard, wandb = packages_of(cfg)
    writers: list[Writer] = []
    if wandb:
        writers.append(WandbWriter(wandb, cfg, run))
    if tensorboard:
        writers.append(TensorBoardWriter(tensorboard, run, resume_step))
    return writers


def packages_of(cfg: RunConfig) -> tuple[ModuleType | None, ModuleType | None]:
    """tensorboardX and wandb where they are asked for. ValueError if one is missing."""
    return (
        _package("tensorboardX", "tensorboard") if cfg.output.tensorboard else None,
        _package("wandb", "wandb") if cfg.output.wandb else None,
    )


def _package(name: str, option: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"output.{option} needs the package {name}; pip install 'dsv3_jax[logging]' "
            f"brings it ({error})"
        ) from error


def scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Names and values of a record's numbers, those in tables inside it too."""
    for name, value in record.items():
        if name in ("kind", "step"):
            continue
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", number) for inner, number in scalars(value))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, float(value)


def text_of(record: dict[str, Any]) -> str:
    """A sample with its prompt, or an event's line."""
    return f"{record.get('prompt') or ''}{record.get('text') or ''}"


class TensorBoardWriter:
    """Event files in the run's folder."""

    def __init__(self, package: ModuleType, run: RunFolder, resume_step: int | None) -> None:
        purge = None if resume_step is None else resume_step + 1
        self._writer = package.SummaryWriter(str(run.path / TENSORBOARD), purge_step=purge)

    def write(self, record: dict[str, Any]) -> None:
        kind, step = record["kind"], record["step"]
        if kind in SCALARS:
            for name, value in scalars(record):
                if math.isfinite(value):
                    self._writer.add_scalar(f"{kind}/{name}", value, step)
        elif kind in ("sample", "event"):
            # TensorBoard reads Markdown: an indented block is shown as it is.
            self._writer.add_text(kind, indent(text_of(record), "    ", lambda line: True), step)

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """A run of a project of Weights & Biases; its x axis is consumed tokens.

    wandb's own step only grows and would swallow what a resumed run repeats, so it is not used.
    """

    def __init__(self, package: ModuleType, cfg: RunConfig, run: RunFolder) -> None:
        known = run.path / WANDB_ID
        try:
            self._run = package.init(
                project=cfg.output.wandb,
                name=run.path.name,
                dir=str(run.path),
                config=dataclasses.asdict(cfg),
                id=known.read_text().strip() if known.exists() else None,
                resume="allow",
            )
        except package.Error as error:
            raise ValueError(f"output.wandb is {cfg.output.wandb!r}: {error}") from error
        replace_file(known, f"{self._run.id}\n".encode())
        self._html = package.Html
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="tokens")

    def write(self, record: dict[str, Any]) -> None:
        kind, place = record["kind"], {"step": record["step"], "tokens": record.get("tokens")}
        if kind in SCALARS:
            named = {f"{kind}/{name}": value for name, value in scalars(record) if name != "tokens"}
            self._run.log(place | named)
        elif kind in ("sample", "event"):
            self._run.log(place | {kind: self._html(f"<pre>{escape(text_of(record))}</pre>")})

    def close(self) -> None:
        self._run.finish()
