"""What a run comes to: throughput, MFU, device-hours and money (report Table 1)."""

from dataclasses import dataclass, replace
from functools import cached_property

from dsv3_jax.config import RunConfig
from dsv3_jax.config.presets import dsv3_671b
from dsv3_jax.config.stairs import stairs
from dsv3_jax.plan.cost import train_flops_per_token
from dsv3_jax.plan.hardware import Hardware, WhatIf, changed
from dsv3_jax.plan.kernel_rates import Figure
from dsv3_jax.plan.layer_time import Job, Time
from dsv3_jax.plan.promotion import promotion_of
from dsv3_jax.plan.step_time import Stepper, StepTime

TRILLION = 10**12
DEAREST = 1_000_000  # US dollars per device-hour that can be asked for
REPORT_HOURS = Figure(180e3, "report, Table 1 and 4.1: H800 hours per trillion tokens")
REPORT_MFU = Figure(0.3894, "arXiv 2505.09343, Table 4: 272.80B tokens a day on 2,048 H800")


@dataclass(frozen=True)
class Prediction:
    """A run on a kind of device, before it runs. Times in seconds."""

    stepper: Stepper
    price: Figure | None
    """US dollars per device-hour"""
    plain: bool
    """Whether hardware and overlap are as they are, and nothing is asked what if"""
    unhidden: Stepper | None = None
    """With FP8 sums promoted as is asked for, if nothing hides what their promotion takes"""

    @property
    def cfg(self) -> RunConfig:
        return self.stepper.cfg

    @property
    def hardware(self) -> Hardware:
        return self.stepper.job.hardware

    @cached_property
    def step(self) -> StepTime:
        """At the full batch."""
        return self.stepper.step(self.cfg.train.rows)

    @cached_property
    def run(self) -> list[tuple[StepTime, int]]:
        """Steps of each size of batch and their number, in order."""
        made = {self.cfg.train.rows: self.step}
        every = list(stairs(self.cfg, 0, self.cfg.train.steps))
        for rows, _ in every:
            if rows not in made:
                made[rows] = self.stepper.step(rows)
        return [(made[rows], count) for rows, count in every]

    def flops_per_token(self, causal: bool, mtp: bool = True) -> int:
        """Of training."""
        return train_flops_per_token(self.cfg.model, self.cfg.data.length, causal, mtp)

    @property
    def tokens_per_step(self) -> int:
        return self.cfg.train.rows * self.cfg.data.length

    @property
    def tokens_per_second(self) -> float:
        """Of one device, at the full batch."""
        return self.tokens_per_step / (self.step.seconds * self.cfg.mesh.size)

    @property
    def hours_per_trillion(self) -> float:
        """Device-hours, at the full batch."""
        return TRILLION / self.tokens_per_second / 3600

    @cached_property
    def unhidden_seconds(self) -> float:
        """Of a step at the full batch, by `unhidden`."""
        return self.unhidden.step(self.cfg.train.rows).seconds

    def mfu(self, causal: bool, mtp: bool = True) -> float:
        """Share of the BF16 peak that the counted FLOPs take."""
        flops = self.flops_per_token(causal, mtp) * self.tokens_per_second
        return flops / self.hardware.bf16.value

    @property
    def run_tokens(self) -> int:
        """Of the whole schedule."""
        return sum(step.rows * count for step, count in self.run) * self.cfg.data.length

    @property
    def run_hours(self) -> float:
        """Device-hours of the whole schedule, its smaller steps among them."""
        seconds = sum(step.seconds * count for step, count in self.run)
        return seconds * self.cfg.mesh.size / 3600

    def dollars(self, hours: float) -> float | None:
        """Of device-hours; None without a price."""
        return None if self.price is None else hours * self.price.value

    @property
    def all_stages(self) -> Time:
        """A micro-batch's way through all stages and back."""
        return sum((s.forward + s.backward for s in self.stepper.stages), Time())

    @property
    def reported(self) -> Figure | None:
        """The report's own device-hours per trillion tokens, of its model on its devices."""
        same = self.cfg.model == dsv3_671b() and self.hardware.name == "h800"
        return REPORT_HOURS if same else None


def predict(
    cfg: RunConfig,
    hardware: Hardware,
    *,
    what_if: WhatIf | None = None,
    overlap: bool = True,
    price: float | None = None,
) -> Prediction:
    """Of a run on these devices; `price` in US dollars per device-hour goes before the known one.

    ValueError, one line, for what cannot be.
    """
    what_if = what_if or WhatIf()
    job = Job(cfg, changed(hardware, what_if), what_if.fused_cast)
    plain = overlap and what_if == WhatIf()
    promotion = promotion_of(cfg, hardware, what_if)
    unhidden = Stepper(replace(job, promotion=promotion), overlap) if promotion else None
    return Prediction(Stepper(job, overlap), price_of(hardware, price), plain, unhidden)


def price_of(hardware: Hardware, asked: float | None) -> Figure | None:
    """US dollars per device-hour: what is asked for, or what is known. ValueError for no price."""
    if asked is None:
        return hardware.price
    if not 0 <= asked <= DEAREST:
        raise ValueError(
            f"--price is {asked:g}; allowed: 0 to {DEAREST:,} US dollars per device-hour"
        )
    return Figure(asked, "--price")
