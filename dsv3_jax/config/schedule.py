"""Values over a run as data: learning rate, batch, bias speed, MTP weight (report 4.2)."""

from dataclasses import dataclass
from typing import Literal

from dsv3_jax.config.fields import check, check_types

LARGEST = 3.4e38  # the compiled step takes float32
ALLOWED = f"0 to {LARGEST:g}"


@dataclass(frozen=True)
class Phase:
    """From `begin` consumed tokens until `end`: at `value` all the time (constant), or towards it
    from the phase before, linearly or by a cosine.
    """

    begin: int
    end: int
    value: float
    shape: Literal["constant", "linear", "cosine"] = "constant"

    def __post_init__(self) -> None:
        check_types("schedule: a phase", self)
        check("schedule: begin of a phase", self.begin, self.begin >= 0, "0 or more")
        if self.end <= self.begin:
            raise ValueError(
                f"schedule: a phase ends at {self.end:,} tokens; allowed: after its begin at "
                f"{self.begin:,}"
            )
        check("schedule: value of a phase", self.value, 0 <= self.value <= LARGEST, ALLOWED)


@dataclass(frozen=True)
class ScheduleConfig:
    """Values over the run: warm-up counts steps, all else consumed tokens (4.2).

    Phases come from files only. Each list starts at 0 and has neither overlap nor gap; its last
    value holds on after its end.
    """

    learning_rate: float = 2.2e-4
    """After warm-up"""
    warmup_steps: int = 2000
    """Linear, up to the full rate in the last of these steps"""
    final_learning_rate: float = 2.2e-5
    """Where the cosine over the whole run ends, if there are no phases"""
    learning_rate_phases: tuple[Phase, ...] = ()
    """In place of that cosine"""
    bias_speed: float = 1e-3
    """gamma of loss-free balancing"""
    bias_speed_phases: tuple[Phase, ...] = ()
    """In place of one gamma"""
    mtp_weight: float = 0.3
    """lambda of the MTP loss"""
    mtp_weight_phases: tuple[Phase, ...] = ()
    """In place of one lambda"""
    rows_phases: tuple[Phase, ...] = ()
    """Rows of a step while the batch grows, constant phases; train.rows after the last"""

    def __post_init__(self) -> None:
        check_types("schedule", self)
        names = ("learning_rate", "warmup_steps", "final_learning_rate", "bias_speed", "mtp_weight")
        for name in names:
            value = getattr(self, name)
            check(f"schedule.{name}", value, 0 <= value <= LARGEST, ALLOWED)
        if not self.learning_rate_phases and self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"schedule.final_learning_rate is {self.final_learning_rate:g}; allowed: at most "
                f"schedule.learning_rate = {self.learning_rate:g}, or phases that say otherwise"
            )
        for name in ("learning_rate", "bias_speed", "mtp_weight", "rows"):
            _check_phases(f"schedule.{name}_phases", getattr(self, f"{name}_phases"))
        for phase in self.rows_phases:
            if phase.shape != "constant" or not float(phase.value).is_integer() or not phase.value:
                raise ValueError(
                    f"schedule.rows_phases: {phase.shape} at {phase.value}; allowed: constant "
                    "phases of whole rows"
                )


def _check_phases(name: str, phases: tuple[Phase, ...]) -> None:
    """ValueError unless each phase begins where the one before ends, and the first at 0."""
    end = 0
    for number, phase in enumerate(phases, start=1):
        if phase.begin != end:
            what = "leaves a gap" if phase.begin > end else "is an overlap"
            raise ValueError(
                f"{name}: phase {number} begins at {phase.begin:,} tokens, which {what}; "
                f"allowed: {end:,}"
            )
        end = phase.end
