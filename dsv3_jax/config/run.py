"""A run as data: what to train, on what, how, and where it goes. Sections are the
`--section.field` flags of the commands.
"""

import dataclasses
import json
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from dsv3_jax.config.fields import check, check_types
from dsv3_jax.config.model import ModelConfig


@dataclass(frozen=True)
class DataConfig:
    """Text and how it becomes rows of tokens (report 4.1)."""

    source: str | tuple[str, ...] = "stdlib"
    """'stdlib' (Python's own standard library, always there) or globs of UTF-8 text files"""
    tokenizer: str = "train"
    """'train' (byte-level BPE of model.vocab_size ids, cached) or the path of a tokenizer.json"""
    validation_fraction: float = 0.02
    """Share of documents, chosen by hash, that is never trained on"""
    length: int = 4096
    """T: tokens of a row"""

    def __post_init__(self) -> None:
        check_types("data", self)
        check("data.length", self.length, self.length >= 2, "at least 2")
        fraction = self.validation_fraction
        check("data.validation_fraction", fraction, 0 < fraction < 1, "between 0 and 1")
        if not self.source:
            raise ValueError("data.source is empty; allowed: 'stdlib' or globs of text files")


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
    seed: int = 0
    """Of initial weights, data order and samples"""

    def __post_init__(self) -> None:
        check_types("train", self)
        for name in ("steps", "rows", "microbatches"):
            check(f"train.{name}", getattr(self, name), getattr(self, name) >= 1, "at least 1")
        if self.rows % self.microbatches:
            raise ValueError(
                f"train.microbatches is {self.microbatches}, "
                f"which does not divide train.rows = {self.rows}"
            )
        check("train.balance_weight", self.balance_weight, self.balance_weight >= 0, "0 or more")
        check("train.seed", self.seed, 0 <= self.seed < 2**32, "0 to 2^32 - 1")


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
    clip_norm: float = 1.0
    """Largest global gradient norm"""
    moment_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """In which both moments are stored"""

    def __post_init__(self) -> None:
        check_types("optimizer", self)
        for name in ("b1", "b2"):
            value = getattr(self, name)
            check(f"optimizer.{name}", value, 0 <= value < 1, "0 to below 1")
        for name in ("eps", "clip_norm"):
            value = getattr(self, name)
            check(f"optimizer.{name}", value, value > 0, "positive numbers")
        decay = self.weight_decay
        check("optimizer.weight_decay", decay, decay >= 0, "0 or more")


@dataclass(frozen=True)
class Phase:
    """A stretch of a schedule: `tokens` tokens that end at `value`, reached at once (constant),
    linearly or by a cosine.
    """

    tokens: int
    value: float
    shape: Literal["constant", "linear", "cosine"] = "constant"

    def __post_init__(self) -> None:
        check_types("schedule.phases", self)
        check("schedule: tokens of a phase", self.tokens, self.tokens >= 1, "at least 1")
        check("schedule: value of a phase", self.value, self.value >= 0, "0 or more")


@dataclass(frozen=True)
class ScheduleConfig:
    """Values over the run: warm-up counts steps, the learning rate then consumed tokens (4.2)."""

    learning_rate: float = 2.2e-4
    """After warm-up"""
    warmup_steps: int = 2000
    """Linear from 0"""
    final_learning_rate: float = 2.2e-5
    """Where the cosine over the whole run ends, if there are no phases"""
    phases: tuple[Phase, ...] = ()
    """Of the learning rate in place of that cosine; in files only"""
    bias_speed: float = 1e-3
    """gamma of loss-free balancing"""
    mtp_weight: float = 0.3
    """lambda of the MTP loss"""

    def __post_init__(self) -> None:
        check_types("schedule", self)
        names = ("learning_rate", "warmup_steps", "final_learning_rate", "bias_speed", "mtp_weight")
        for name in names:
            value = getattr(self, name)
            check(f"schedule.{name}", value, 0 <= value < float("inf"), "0 or more")


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
    sample_tokens: int = 200
    """Tokens of the sample written at the end; 0 for none"""
    sample_prompt: str = 'class Reader:\n    def read(self, size):\n        """'
    """What the sample continues"""
    sample_temperature: float = 0.5
    """0 takes the likeliest token each time"""

    def __post_init__(self) -> None:
        check_types("output", self)
        for name in ("log_every", "eval_every", "eval_rows", "save_every"):
            check(f"output.{name}", getattr(self, name), getattr(self, name) >= 1, "at least 1")
        check("output.sample_tokens", self.sample_tokens, self.sample_tokens >= 0, "0 or more")
        temperature = self.sample_temperature
        check("output.sample_temperature", temperature, temperature >= 0, "0 or more")
        if not self.name or "/" in self.name:
            raise ValueError(f"output.name is {self.name!r}; allowed: a name without '/'")


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        check_types("", self)
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
        elif name == "phases" and isinstance(value, list | tuple):
            value = tuple(from_dict(Phase, phase, path) for phase in value)
        elif isinstance(value, list):
            value = tuple(value)
        built[name] = value
    return kind(**built)
