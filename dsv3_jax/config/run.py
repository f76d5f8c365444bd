"""A run as data: what to train, on what, how, and where it goes. Sections are the
`--section.field` flags of the commands.
"""

import dataclasses
import json
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from dsv3_jax.config.data import DataConfig
from dsv3_jax.config.fields import check, check_temperature, check_types
from dsv3_jax.config.mesh import MeshConfig
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.pipeline import PipelineConfig
from dsv3_jax.config.quant import DTYPES, QuantConfig
from dsv3_jax.config.schedule import ScheduleConfig


@dataclass(frozen=True)
class TrainConfig:
    """How long and how."""

    steps: int = 1000
    """Optimiser steps of the whole run"""
    rows: int = 8
    """B: rows of a step over all micro-batches"""
    microbatches: int = 1
    """Parts a step's rows are computed in, one after the other"""
    dtype: Literal["float32", "bfloat16", "float64"] = "bfloat16"
    """Of activations and matrix products; masters, router and softmax stay float32 or wider"""
    remat: Literal["none", "report", "full"] = "none"
    """Recomputed in backward: nothing, norms and MLA up-projections (3.2.3), or whole layers"""
    balance_weight: float = 1e-4
    """alpha of the sequence-wise balance loss"""
    max_bad_steps: int = 3
    """Updates in a row that were not finite and so were skipped, which end the run (exit code 3)"""
    spike: Literal["off", "skip", "rewind"] = "off"
    """At a loss far above the recent ones: skip the update; or also go back to a checkpoint"""
    spike_deviations: float = 6.0
    """How far is far, in standard deviations of the recent losses"""
    seed: int = 0
    """Of initial weights, data order and samples"""

    def __post_init__(self) -> None:
        check_types("train", self)
        for name in ("steps", "rows", "microbatches", "max_bad_steps"):
            check(f"train.{name}", getattr(self, name), getattr(self, name) >= 1, "at least 1")
        if self.rows % self.microbatches:
            raise ValueError(
                f"train.microbatches is {self.microbatches}, "
                f"which does not divide train.rows = {self.rows}"
            )
        check("train.balance_weight", self.balance_weight, self.balance_weight >= 0, "0 or more")
        deviations = self.spike_deviations
        check("train.spike_deviations", deviations, deviations > 0, "positive numbers")
        check("train.seed", self.seed, 0 <= self.seed < 2**32, "0 to 2^32 - 1")


@dataclass(frozen=True)
class ParamGroup:
    """Parameters whose name holds `match`, and what is special about them."""

    match: str
    learning_rate: float = 1.0
    """Factor on the run's"""
    decay: bool | None = None
    """Whether weight decay acts on them; None: on all but the gains of norms"""

    def __post_init__(self) -> None:
        check_types("optimizer: a group", self)
        rate = self.learning_rate
        check("optimizer: learning_rate of a group", rate, rate >= 0, "0 or more")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (report 4.2)."""

    b1: float = 0.9
    """Decay of the first moment"""
    b2: float = 0.95
    """Decay of the second moment"""
    eps: float = 1e-8
    """Added to the root of the second moment (unpublished)"""
    weight_decay: float = 0.1
    """Decoupled; not on norms and router biases"""
    groups: tuple[ParamGroup, ...] = ()
    """The first group that matches a parameter's name decides; from files only"""
    clip_norm: float = 1.0
    """Largest global gradient norm"""
    moment_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """In which both moments are stored"""
    ema_decay: float = 0.0
    """Of an average of the weights in host memory (3.2.3; decay unpublished); 0 for none"""

    def __post_init__(self) -> None:
        check_types("optimizer", self)
        for name in ("b1", "b2", "ema_decay"):
            value = getattr(self, name)
            check(f"optimizer.{name}", value, 0 <= value < 1, "0 to below 1")
        for name in ("eps", "clip_norm"):
            value = getattr(self, name)
            check(f"optimizer.{name}", value, value > 0, "positive numbers")
        decay = self.weight_decay
        check("optimizer.weight_decay", decay, decay >= 0, "0 or more")


@dataclass(frozen=True)
class OutputConfig:
    """Where a run goes and what it tells on the way."""

    folder: str = "runs"
    """Every run makes a folder of its own in here"""
    name: str = "run"
    """Of the run; a number is added"""
    log_every: int = 10
    """Steps between entries of metrics.jsonl"""
    eval_every: int = 100
    """Steps between validations"""
    eval_rows: int = 64
    """Validation rows on the way; the whole split at the end"""
    save_every: int = 500
    """Steps between checkpoints; one is always made at the end"""
    keep_last: int = 0
    """Newest checkpoints that stay; 0: all"""
    keep_every: int = 0
    """Steps whose multiples stay besides, for good; 0: none"""
    sample_tokens: int = 200
    """Tokens of the sample written at the end; 0 for none"""
    sample_prompt: str = 'class Reader:\n    def read(self, size):\n        """'
    """What the sample continues"""
    sample_temperature: float = 0.5
    """0 takes the likeliest token each time"""
    tensorboard: bool = False
    """Also write event files for TensorBoard (needs the extra `logging`)"""
    wandb: str = ""
    """Also log to this project of Weights & Biases (needs the extra `logging`)"""

    def __post_init__(self) -> None:
        check_types("output", self)
        for name in ("log_every", "eval_every", "eval_rows", "save_every"):
            check(f"output.{name}", getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("keep_last", "keep_every"):
            check(f"output.{name}", getattr(self, name), getattr(self, name) >= 0, "0 or more")
        self._check_keep_every()
        check("output.sample_tokens", self.sample_tokens, self.sample_tokens >= 0, "0 or more")
        check_temperature("output.sample_temperature", self.sample_temperature)
        if not self.folder:
            raise ValueError("output.folder is ''; allowed: a folder, such as . for this one")
        if not self.name or "/" in self.name:
            raise ValueError(f"output.name is {self.name!r}; allowed: a name without '/'")

    def _check_keep_every(self) -> None:
        """What would keep nothing: every checkpoint stays, or none is of such a step."""
        every = self.keep_every
        if every and not self.keep_last:
            raise ValueError(
                f"output.keep_every is {every} and output.keep_last 0, which keeps all; "
                "allowed: with an output.keep_last of at least 1"
            )
        if every % self.save_every:
            raise ValueError(
                f"output.keep_every is {every}; "
                f"allowed: multiples of output.save_every = {self.save_every}"
            )


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)

    def __post_init__(self) -> None:
        check_types("", self)
        dtype = DTYPES.get(self.quant.recipe, self.train.dtype)
        object.__setattr__(self, "train", dataclasses.replace(self.train, dtype=dtype))
        if self.data.length > self.model.max_length:
            raise ValueError(
                f"data.length is {self.data.length}; "
                f"allowed: at most model.max_length = {self.model.max_length}"
            )
        if self.data.length <= self.model.mtp_depth:
            raise ValueError(
                f"data.length is {self.data.length}; "
                f"allowed: more than model.mtp_depth = {self.model.mtp_depth}"
            )
        self.mesh.check_model(self.model)
        self.mesh.check_rows(self.train.rows, self.train.microbatches)
        self.mesh.check_length(self.data.length)
        part = self.train.rows // self.train.microbatches
        for phase in self.schedule.rows_phases:
            if phase.value % part:
                raise ValueError(
                    f"schedule.rows_phases: {phase.value:g} rows; allowed: multiples of a "
                    f"micro-batch, {part} rows (train.rows / train.microbatches)"
                )

    @property
    def part_length(self) -> int:
        """Tokens of a row on one device."""
        return self.data.length // self.mesh.row_shards

    def to_json(self) -> str:
        """The whole configuration, readable by `from_dict(json.loads(...))`."""
        return json.dumps(dataclasses.asdict(self), indent=2)


def from_dict(kind: type, values: dict[str, Any], where: str = "") -> Any:
    """A config dataclass from nested plain values. ValueError names what cannot be used."""
    if not isinstance(values, dict):
        raise ValueError(f"{where or kind.__name__} is {values!r}; allowed: a table of fields")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(
            f"{where or kind.__name__} has no field {', '.join(unknown)}; "
            f"fields: {', '.join(hints)}"
        )
    built = {}
    for name, value in values.items():
        path = f"{where}.{name}".strip(".")
        if dataclasses.is_dataclass(hints[name]):
            value = from_dict(hints[name], value, path)
        elif isinstance(value, list | tuple):
            inner = next(iter(typing.get_args(hints[name])), None)  # X of tuple[X, ...]
            is_table = dataclasses.is_dataclass(inner)
            value = tuple(from_dict(inner, item, path) if is_table else item for item in value)
        built[name] = value
    return kind(**built)
