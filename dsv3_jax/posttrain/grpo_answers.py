"""A batch of answers with their rewards, as all processes and checkpoints of a run have it."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from dsv3_jax.posttrain.grpo_objective import equal_groups
from dsv3_jax.posttrain.rewards import Total
from dsv3_jax.posttrain.rollouts import Group, Output


@dataclass
class Answers:
    """Of one batch, answers in order, group by group. Plain numbers and lists alone but for
    `groups`, so that JSON gives back the same.
    """

    number: int
    """Of the batch"""
    groups: list[Group]
    rewards: list[float]
    parts: dict[str, list[float]]
    """Each reward's values before their weights"""
    failed: list[bool]
    """Whether any part of a reward was a failure"""
    reasons: dict[str, int]
    """Of failures, the most common ones"""
    seconds: dict[str, float]
    """Of drawing and rating"""
    old: list[float] = field(default_factory=list)
    """log pi of each answer before the first update on them; this and the rest come with that"""
    reference: list[float] | None = None
    left_out: list[bool] = field(default_factory=list)
    drift: dict[str, float] = field(default_factory=dict)

    @classmethod
    def rated(
        cls,
        number: int,
        groups: list[Group],
        totals: Sequence[Total],
        seconds: Mapping[str, float],
    ) -> "Answers":
        """Fresh ones."""
        names = list(totals[0].parts)
        failures = [part.reason for one in totals for part in one.parts.values() if part.failed]
        return cls(
            number,
            groups,
            [one.value for one in totals],
            {name: [one.parts[name].value for one in totals] for name in names},
            [one.failed for one in totals],
            dict(Counter(failures).most_common(3)),
            dict(seconds),
        )

    @property
    def outputs(self) -> list[Output]:
        """All of them."""
        return [output for group in self.groups for output in group.outputs]

    @property
    def rewards_PG(self) -> np.ndarray:
        """float64 [groups, answers of each]."""
        return np.array(self.rewards, np.float64).reshape(len(self.groups), -1)

    def to_json(self) -> str:
        """Readable by `of_json`, number for number."""
        return json.dumps({f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def of_json(cls, text: str) -> "Answers":
        """The way back."""
        read = json.loads(text)
        return cls(**read | {"groups": [Group.of_json(group) for group in read["groups"]]})

    def told(self) -> dict[str, Any]:
        """Of rewards and answers, for a step's record."""
        outputs, tokens = self.outputs, [len(output.tokens) for output in self.outputs]
        drawing = max(self.seconds["answers"], 1e-9)
        return {
            "batch": self.number,
            "reward_std": float(np.std(self.rewards)),
            "parts": {name: float(np.mean(values)) for name, values in self.parts.items()},
            "failed": float(np.mean(self.failed)),
            "equal_groups": float(equal_groups(self.rewards_PG).mean()),
            "length": float(np.mean(tokens)),
            "cut": float(np.mean([not output.ended for output in outputs])),
            "tokens_per_second": sum(tokens) / drawing,
            "seconds": self.seconds,
        }


def lines_of(
    answers: Answers, asked: Sequence[Mapping[str, Any]], totals: Sequence[Total], advantage_N
) -> list[str]:
    """JSON, a line for each answer: to be read by people. `asked`: id and prompt of each group."""
    size, made = len(totals) // len(asked), []
    for place, (output, total) in enumerate(zip(answers.outputs, totals, strict=True)):
        made.append(
            json.dumps(
                {
                    **asked[place // size],
                    "text": output.text,
                    "ended": output.ended,
                    "tokens": len(output.tokens),
                    "reward": total.value,
                    "advantage": float(advantage_N[place]),
                    "parts": {name: asdict(part) for name, part in total.parts.items()},
                },
                ensure_ascii=False,
            )
        )
    return made
