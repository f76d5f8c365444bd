"""What happened in a run, in words and figures, from its entries: the top of its page.

Every statement comes from entries that are there; a run of old, whose entries lack keys, says less.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from dsv3_jax.config import RunConfig
from dsv3_jax.drawing import column, short, smoothed
from dsv3_jax.train.metrics import clock
from dsv3_jax.train.report import Result, verdict

GOOD, BAD, WARN = "good", "bad", "warn"
TONES = {"green": GOOD, "bold red": BAD, "yellow": WARN, "": ""}
QUIET = frozenset({"warning", "resumed", "weights"})  # events that are no trouble
IDLE_SHARE = 0.1  # of a layer's mean load; below, an expert is called idle


class Sentence(NamedTuple):
    """Text with a tone: "good", "bad", "warn" or none."""

    text: str
    tone: str = ""


class Tile(NamedTuple):
    """One figure: what it is, its value, and a line below it."""

    label: str
    value: str
    below: str = ""
    tone: str = ""


class Facts(NamedTuple):
    """What tiles and sentences are made from; NaN or empty where entries say nothing."""

    cfg: RunConfig
    result: Result | None
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    events: list[dict[str, Any]]

    @property
    def last(self) -> dict[str, Any]:
        return self.train[-1] if self.train else {}

    def latest(self, name: str) -> float:
        """The last training entry's value, or NaN."""
        return column([self.last], name)[0]

    @property
    def bits_per_byte(self) -> float:
        if self.result:
            return self.result.bits_per_byte
        return column(self.validation, "bits_per_byte")[-1] if self.validation else math.nan

    @property
    def other_trouble(self) -> int:
        """Events beside skipped updates that are no good news."""
        return sum(entry.get("event") not in QUIET | {"skipped"} for entry in self.events)

    @property
    def skipped(self) -> int:
        """Updates skipped so far: the training entries' count, or the events."""
        counted = column(self.train, "skipped")
        known = [int(value) for value in counted if math.isfinite(value)]
        seen = sum(entry.get("event") == "skipped" for entry in self.events)
        return max([seen, *known[-1:]])


def facts_of(cfg: RunConfig, entries: Sequence[dict[str, Any]], result: Result | None) -> Facts:
    """The entries by kind."""
    kinds = ("train", "validation", "event")
    return Facts(cfg, result, *([e for e in entries if e["kind"] == kind] for kind in kinds))


def state(facts: Facts) -> Sentence:
    """How the run ended, or that it has not."""
    steps, done = facts.cfg.train.steps, int(facts.last.get("step", 0))
    diverged = bool(facts.train) and not math.isfinite(facts.latest("main_loss"))
    rewarded = facts.cfg.data.weighted and done == steps and not diverged
    if rewarded or (facts.result and math.isfinite(facts.result.bits_per_byte)):
        return Sentence(f"Finished: all {done:,} steps", GOOD)
    if facts.result or diverged:
        return Sentence(f"The loss is not finite after {done:,} of {steps:,} steps", BAD)
    return Sentence(f"Not finished: {done:,} of {steps:,} steps ({done / steps:.0%})", WARN)


def sentences(facts: Facts, last_shares_LE: Any) -> list[Sentence]:
    """The run in a few sentences. `last_shares_LE`: expert loads over their layer's mean at the
    end, or None.
    """
    learned = _rewards if facts.cfg.data.weighted else _losses
    said = [_yardstick(facts), learned(facts), _validations(facts), _balance(facts)]
    said += [_idle(last_shares_LE), _trouble(facts), _waiting(facts)]
    return [sentence for sentence in said if sentence]


def _yardstick(facts: Facts) -> Sentence | None:
    if not facts.result or facts.result.zlib_bits_per_byte is None:
        return None
    who, style = verdict(facts.result.bits_per_byte, facts.result.zlib_bits_per_byte)
    return Sentence(f"On held-out text {who}.", TONES[style])


def _losses(facts: Facts) -> Sentence | None:
    values = column(facts.train, "main_loss")
    finite = [value for value in smoothed(values) if math.isfinite(value)]
    if len(finite) < 2:
        return None
    return Sentence(f"Training loss went from {finite[0]:.3f} to {finite[-1]:.3f} nats per token.")


def _rewards(facts: Facts) -> Sentence | None:
    finite = [value for value in smoothed(column(facts.train, "reward")) if math.isfinite(value)]
    if len(finite) < 2:
        return None
    return Sentence(f"The mean reward went from {finite[0]:.3f} to {finite[-1]:.3f}.")


def _validations(facts: Facts) -> Sentence | None:
    points = zip(
        column(facts.validation, "bits_per_byte"), column(facts.validation, "tokens"), strict=True
    )
    points = [(value, tokens) for value, tokens in points if math.isfinite(value)]
    if len(points) < 2:
        return None
    (first, _), (last, _), (best, place) = points[0], points[-1], min(points)
    text = f"Validation went from {first:.3f} to {last:.3f} bits per byte"
    if last > 1.01 * best:
        best_text = f"{text}; its best was {best:.3f} after {short(place)} tokens, before the end."
        return Sentence(best_text, WARN)
    return Sentence(f"{text}.")


def _balance(facts: Facts) -> Sentence | None:
    values = smoothed(column(facts.train, "max_violation"))
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    # MaxVio 1: the busiest expert has twice the mean.
    return Sentence(
        f"The busiest expert of a layer had {1 + finite[-1]:.2f} times the mean load at the end, "
        f"{1 + max(finite):.2f} times at the worst (MaxVio {finite[-1]:.2f} and {max(finite):.2f})."
    )


def _idle(last_shares_LE: Any) -> Sentence | None:
    if last_shares_LE is None:
        return None
    idle, total = int((last_shares_LE < IDLE_SHARE).sum()), last_shares_LE.size
    if not idle:
        return Sentence(f"All {total:,} experts were in use.")
    return Sentence(
        f"{idle:,} of {total:,} experts had less than a tenth of the mean load at the end.", WARN
    )


def _trouble(facts: Facts) -> Sentence | None:
    counted = Counter(str(entry.get("event", "event")) for entry in facts.events)
    counted.pop("skipped", None)
    others = [f"{name} {_times(number)}" for name, number in counted.items() if name not in QUIET]
    if facts.skipped:
        others.insert(0, f"{facts.skipped:,} update{'s' * (facts.skipped != 1)} skipped")
    if others:
        return Sentence(f"Trouble: {', '.join(others)}.", WARN)
    if "skipped" not in facts.last:  # a run of old, which did not count them
        return None
    return Sentence("No trouble: no update was skipped.")


def _times(number: int) -> str:
    return {1: "once", 2: "twice"}.get(number, f"{number:,} times")


def _waiting(facts: Facts) -> Sentence | None:
    shares = [share for share in column(facts.train, "data_wait") if math.isfinite(share)]
    if not shares:
        return None
    mean = sum(shares) / len(shares)
    return Sentence(f"It waited for data {mean:.1%} of the time.", WARN if mean > 0.05 else "")


def tiles(facts: Facts) -> list[Tile]:
    """The figures that say most; those that nobody measured are left out."""
    made = [_progress_tile(facts), _time_tile(facts), _speed_tile(facts)]
    made.append(_learning_tile(facts))
    made.append(Tile("MaxVio", _number(facts.latest("max_violation"), ".2f"), "last entry"))
    memory = facts.latest("peak_memory") / 1e9
    made.append(Tile("peak memory", _number(memory, ".2f", " GB"), "of the host process"))
    made.append(_trouble_tile(facts))
    return [tile for tile in made if tile.value]


def _learning_tile(facts: Facts) -> Tile:
    if facts.cfg.data.weighted:
        return Tile("reward", _number(facts.latest("reward"), ".4g"), "mean of the last step")
    loss = facts.result.validation_loss if facts.result else facts.latest("main_loss")
    kind = "validation" if facts.result else "training"
    return Tile("loss", _number(loss, ".4f"), f"nats per token, {kind}")


def _trouble_tile(facts: Facts) -> Tile:
    others = facts.other_trouble
    tone = WARN if facts.skipped or others else ""
    below = f"and other trouble: {others:,}" if others else "see events" if facts.events else ""
    known = "skipped" in facts.last or facts.events  # a run of old did not count them
    return Tile("skipped updates", f"{facts.skipped:,}" if known else "", below, tone)


def _progress_tile(facts: Facts) -> Tile:
    tokens = facts.result.tokens if facts.result else facts.latest("tokens")
    done = facts.result.steps if facts.result else facts.last.get("step", 0)
    passes = facts.result.passes if facts.result else None
    below = f"in {done:,} steps" + (f", {passes:.2g} times the text" if passes else "")
    return Tile("tokens", _number(tokens, "") and short(tokens), below)


def _time_tile(facts: Facts) -> Tile:
    seconds = facts.result.seconds if facts.result else facts.latest("seconds")
    return Tile("time", clock(seconds) if math.isfinite(seconds) else "", "of training")


def _speed_tile(facts: Facts) -> Tile:
    source = facts.result
    speed = source.tokens_per_second if source else facts.latest("tokens_per_second")
    share = source.matmul_share if source else facts.latest("matmul_share")
    return Tile("tokens per second", _number(speed, ",.0f"), _share(share))


def _share(share: float) -> str:
    return f"{share:.1%} of the matmul peak" if math.isfinite(share) else ""


def _number(value: float, form: str, unit: str = "") -> str:
    return f"{value:{form}}{unit}" if math.isfinite(value) else ""
