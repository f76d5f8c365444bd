"""The part of a run's page about rewards of its own answers."""

from collections.abc import Sequence
from typing import Any

from dsv3_jax.drawing import BLUE, GREEN, ORANGE, SERIES, column
from dsv3_jax.train.page_pictures import LARGE, SMALL, Curve, Picture, draw, frame_of, of_kind

NOTE = (
    "means of a step; KL from the weights that the run began with; engine and training compare "
    "log-probabilities of the same answers under the same weights"
)


def large(entries: Sequence[dict[str, Any]]) -> list[Picture]:
    """Rewards, whole and by part, and the divergence; none for other runs."""
    train = _rewarded(entries)
    tokens = [float(entry["tokens"]) for entry in train]
    parts = list(dict.fromkeys(name for entry in train for name in entry["grpo"]["parts"]))
    curves = [Curve("sum", BLUE, tokens, [float(entry["reward"]) for entry in train])]
    for place, name in enumerate(parts if len(parts) > 1 else (), start=1):
        values = [entry["grpo"]["parts"].get(name, float("nan")) for entry in train]
        curves.append(Curve(name, SERIES[place % len(SERIES)], tokens, values, {"linewidth": 1.0}))
    kl = [Curve("", BLUE, tokens, [float(entry["kl"]) for entry in train])]
    frame = frame_of(entries)
    return _drawn(
        draw("Reward", curves, frame, LARGE),
        draw("KL, nats per answer", kl, frame, LARGE, zero=True),
    )


def small(entries: Sequence[dict[str, Any]]) -> list[Picture]:
    """Of answers, and of engine and training."""
    train, frame = _rewarded(entries), frame_of(entries)
    tokens = [float(entry["tokens"]) for entry in train]

    def curve(label: str, color: str, name: str, factor: float = 1.0) -> Curve:
        values = column([entry["grpo"] for entry in train], name)
        return Curve(label, color, tokens, [factor * value for value in values])

    panels = {
        "Tokens of an answer": [curve("", BLUE, "length")],
        "Answers, %": [
            curve("cut", ORANGE, "cut", 100),
            curve("failed rewards", GREEN, "failed", 100),
            curve("clipped", BLUE, "clipped", 100),
        ],
        "Groups of equal rewards, %": [curve("", BLUE, "equal_groups", 100)],
        "Engine to training, nats per token": [
            curve("most", ORANGE, "drift_most"),
            curve("mean", BLUE, "drift"),
        ],
    }
    drawn = (draw(title, curves, frame, SMALL, zero=True) for title, curves in panels.items())
    return _drawn(*drawn)


def _rewarded(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in of_kind(entries, "train") if entry.get("grpo")]


def _drawn(*pictures: Picture | None) -> list[Picture]:
    return [picture for picture in pictures if picture]
