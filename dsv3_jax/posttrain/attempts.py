"""What a reward looks at and what it says."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dsv3_jax.config.fields import shown
from dsv3_jax.posttrain.completions import Completion, with_reasoning

_LONGEST = 300  # characters of a reason
MOST = 1e30  # in size, of a value and of its weight: sums of their products, squared, stay finite


@dataclass(frozen=True)
class Attempt:
    """An answer to a prompt."""

    prompt: str
    text: str
    """Without its reasoning"""
    reasoning: str | None = None
    reference: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What else the prompt's line has, `tests` and `cases` for one; JSON"""
    cut: bool = False
    """Whether its length ended it"""
    tokens: int | None = None
    """Of the answer, reasoning included, if they were counted"""
    id: str = ""
    kind: str = ""

    @property
    def whole(self) -> str:
        """The assistant's turn, as it stood."""
        return with_reasoning(Completion(self.text, self.reasoning))

    def to_json(self) -> dict[str, Any]:
        """Its fields; `Attempt(**fields)` is the way back."""
        return asdict(self)


@dataclass(frozen=True)
class Rated:
    """A value with its reason."""

    value: float
    reason: str = ""
    failed: bool = False
    """No judgement: the reward raised, hung, or returned no number"""

    @classmethod
    def failure(cls, why: BaseException | str) -> "Rated":
        """Its value is for others to choose."""
        if isinstance(why, BaseException):
            why = f"{type(why).__name__}: {why}"
        return cls(0.0, " ".join(why.split())[:_LONGEST], True)

    @classmethod
    def of(cls, said: Any) -> "Rated":
        """Of what a reward returned: a Rated, a number (booleans too), a pair of number and reason.
        A failure for anything else, NaN and what is larger than MOST among it.
        """
        match said:
            case Rated():
                value, reason = said.value, said.reason
                if said.failed:
                    return said
            case (value, str() as reason):
                pass
            case _:
                value, reason = said, ""
        try:
            number = float(value) if not isinstance(value, str | bytes) else math.nan
        except Exception:  # whatever a plug-in returned may raise anything
            number = math.nan
        if not abs(number) <= MOST:
            allowed = f"a finite number of at most {MOST:g} in size, or a pair of it and a reason"
            return cls.failure(f"the reward returned {shown(said)}; allowed: {allowed}")
        return cls(number, " ".join(reason.split())[:_LONGEST])
