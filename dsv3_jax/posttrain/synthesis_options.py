"""How answers are drawn and which of them are kept, as options of a command. Loads no JAX."""

from dataclasses import dataclass
from typing import Literal

from dsv3_jax.config.fields import check, check_temperature, check_top_p


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token"""
    top_p: float = 1.0
    """Draw from the likeliest tokens of this total probability"""
    max_tokens: int = 1024
    """Of an answer, reasoning included; one that is cut by it is not kept"""
    stop: tuple[str, ...] = ()
    """Strings before which an answer ends"""

    def check(self) -> None:
        """ValueError, in the names of the options."""
        check_temperature("--temperature", self.temperature)
        check_top_p("--top-p", self.top_p)
        check("--max-tokens", self.max_tokens, self.max_tokens >= 1, "1 or more")
        check("--stop", "''", "" not in self.stop, "strings of one character or more")


@dataclass(frozen=True)
class Selection:
    """How many and which."""

    keep: int = 1
    """Most samples of a problem"""
    prefer: Literal["first", "shortest"] = "first"
    """Of those that could be kept, by their number or by their length"""
    near_duplicates: float = 0.8
    """Share of common word n-grams from which a later sample goes; 0: none goes"""
    near_ngram: int = 5
    """Words and symbols of each of these n-grams"""
    contamination_ngram: int = 13
    """Words in a row that a sample may not share with an evaluation text"""

    def check(self) -> None:
        """ValueError, in the names of the options."""
        near = self.near_duplicates
        check("--keep", self.keep, self.keep >= 1, "1 or more")
        check("--near-duplicates", near, 0 <= near <= 1, "0 to 1")
        check("--near-ngram", self.near_ngram, self.near_ngram >= 1, "1 or more")
        size = self.contamination_ngram
        check("--contamination-ngram", size, size >= 1, "1 or more")
