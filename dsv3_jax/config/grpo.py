"""Reinforcement learning in groups, as data: what is drawn, rated and weighed (report 5.2.2)."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from dsv3_jax.config.fields import check, check_temperature, check_top_p, check_types
from dsv3_jax.config.load import ConfigFileError
from dsv3_jax.config.plain_json import read_json
from dsv3_jax.config.run import from_dict


@dataclass(frozen=True)
class GrpoConfig:
    """Of one run. The report gives no numbers; kl is DeepSeekMath's."""

    reward: tuple[str, ...] = ()
    """NAME or NAME*WEIGHT; may be given several times: boxed, exact, proof, regex:PATTERN, json,
    words:LEAST-MOST, format:NAME, length:FREE-MOST, tests, tests:share, judge:reference,
    judge:score, judge:principles, python:module:function (docs/rewards.md)"""
    reward_failed: float = 0.0
    """Value of a reward that raises, hangs or returns no number"""
    prompts_per_step: int = 8
    """Questions of a batch"""
    group: int = 8
    """G: answers to each question"""
    max_tokens: int = 256
    """Of an answer, the token that ends it included"""
    temperature: float = 1.0
    """Divides the logits when answers are drawn; only at 1 are they the policy's own"""
    top_p: float = 1.0
    """Draw from the likeliest tokens of this total probability"""
    clip: float = 0.2
    """epsilon: how far an answer's probability ratio to the old policy counts"""
    kl: float = 0.04
    """beta: weight of the divergence from the weights that the run began with; 0: none"""
    updates: int = 1
    """Steps on each batch of answers"""
    max_difference: float = 0.5
    """Nats per token between engine and training, in the mean over an answer, above which it is
    left out"""

    def __post_init__(self) -> None:
        check_types("", self)
        for name in ("prompts_per_step", "max_tokens", "updates"):
            check(_flag(name), getattr(self, name), getattr(self, name) >= 1, "1 or more")
        check("--group", self.group, self.group >= 2, "2 or more, since one is no group")
        check("--temperature", self.temperature, self.temperature > 0, "above 0")
        check_temperature("--temperature", self.temperature)
        check_top_p("--top-p", self.top_p)
        check("--clip", self.clip, 0 < self.clip < 1, "between 0 and 1")
        check("--kl", self.kl, self.kl >= 0, "0 or more")
        check("--max-difference", self.max_difference, self.max_difference > 0, "above 0")

    @property
    def outputs(self) -> int:
        """Answers of a batch."""
        return self.prompts_per_step * self.group

    def to_json(self) -> str:
        """Readable by `load_grpo`."""
        return json.dumps(dataclasses.asdict(self), indent=2)


def load_grpo(path: Path) -> GrpoConfig:
    """What `to_json` wrote. ConfigFileError for what cannot be read."""
    try:
        return from_dict(GrpoConfig, read_json(path))
    except (OSError, AttributeError, TypeError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise ConfigFileError(f"{path}: not readable settings of GRPO: {said}") from error


def _flag(name: str) -> str:
    return f"--{name}".replace("_", "-")
