"""Text and how it becomes rows of tokens, as data (report 4.1)."""

from dataclasses import dataclass
from typing import Literal

from dsv3_jax.config.fields import check, check_types


@dataclass(frozen=True)
class DataConfig:
    """Text and how it becomes rows of tokens (report 4.1)."""

    source: str | tuple[str, ...] = "stdlib"
    """'stdlib', globs of text, .jsonl or .parquet files, or folders written by `pretokenize`"""
    weights: tuple[float, ...] = ()
    """Shares of the rows that come from each source; none: all documents once an epoch"""
    text_field: str = "text"
    """Of a JSONL line or a Parquet row: where the text is"""
    bad_utf8: Literal["reject", "replace"] = "reject"
    """Bytes that are no UTF-8: an error, or U+FFFD"""
    tokenizer: str = "train"
    """'train' (byte-level BPE of model.vocab_size ids, cached) or the path of a tokenizer.json"""
    validation_fraction: float = 0.02
    """Share of documents, chosen by hash, that is never trained on"""
    length: int = 4096
    """T: tokens of a row"""
    readers: int = 1
    """Threads that read ahead; batches do not depend on it"""
    fim_rate: float = 0.0
    """Share of documents in fill-in-the-middle order: prefix, suffix, middle (the report: 0.1)"""
    split_rate: float = 0.0
    """Share of the tokens that join punctuation with line ends that is split (unpublished)"""
    isolate: bool = False
    """Documents of one row do not see each other (for fine-tuning; not so in the report)"""
    format: Literal["text", "messages", "prompts"] = "text"
    """What the source is: texts; conversations to fine-tune on, JSONL with `messages` (5.1); or
    prompts for reinforcement learning (5.2)"""
    chat_template: str = ""
    """Of conversations: a Jinja file; '': that of the weights' folder, else DeepSeek's"""
    too_long: Literal["drop", "cut"] = "drop"
    """Conversations of more tokens than a row has: left out, or their beginning is taken"""

    def __post_init__(self) -> None:
        check_types("data", self)
        check("data.length", self.length, self.length >= 2, "at least 2")
        check("data.readers", self.readers, self.readers >= 1, "at least 1")
        fraction = self.validation_fraction
        check("data.validation_fraction", fraction, 0 < fraction < 1, "between 0 and 1")
        for name in ("fim_rate", "split_rate"):
            check(f"data.{name}", getattr(self, name), 0 <= getattr(self, name) <= 1, "0 to 1")
        entries = (self.source,) if isinstance(self.source, str) else self.source
        if not entries or not all(entries):
            raise ValueError("data.source is empty; allowed: 'stdlib', globs or token folders")
        self._check_weights()
        self._check_format()

    @property
    def weighted(self) -> bool:
        """Whether each label has a weight in the loss."""
        return self.format == "prompts"

    def _check_weights(self) -> None:
        sources = 1 if isinstance(self.source, str) else len(self.source)
        if self.weights and len(self.weights) != sources:
            raise ValueError(
                f"data.weights has {len(self.weights)} values for {sources} sources; "
                "allowed: one for each source, or none"
            )
        for weight in self.weights:
            check("data.weights: a weight", weight, weight >= 0, "0 or more")
        if self.weights and not sum(self.weights):
            raise ValueError("data.weights sum to 0; allowed: at least one above 0")

    def _check_format(self) -> None:
        """What conversations need, and what would do nothing with them, or with texts."""
        needed: dict[str, object] = {"chat_template": "", "too_long": "drop"}
        if self.format != "text":
            needed = {"isolate": True, "fim_rate": 0, "split_rate": 0, "weights": ()}
        if self.format == "prompts":
            needed["too_long"] = "drop"
        for name, value in needed.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"data.{name} is {getattr(self, name)}; allowed with data.format "
                    f"{self.format}: {value!r}"
                )
