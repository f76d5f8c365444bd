"""The part of a run's page about tokens on their way between devices."""

from collections.abc import Sequence
from typing import Any

from dsv3_jax.drawing import BLUE, ORANGE
from dsv3_jax.train.page_pictures import SMALL, Curve, Picture, draw, frame_of, of_kind

NOTE = (
    "of layers; rounds beyond the first carry what found no room in a bucket; bytes without empty "
    "rows, and without weights and their gradients"
)


def pictures(entries: Sequence[dict[str, Any]]) -> list[Picture]:
    """Evenness, rounds, crossings and bytes over the run; none for runs without an exchange."""
    train = [entry for entry in of_kind(entries, "train") if entry.get("exchange")]
    tokens = [float(entry["tokens"]) for entry in train]

    def curve(label: str, color: str, name: str, factor: float = 1.0) -> Curve:
        return Curve(label, color, tokens, [factor * entry["exchange"][name] for entry in train])

    panels = {
        "Fullest device, copies over the mean (1 is even)": [curve("", BLUE, "device_imbalance")],
        "Rounds": [curve("mean of layers", BLUE, "rounds"), curve("most", ORANGE, "most_rounds")],
        "Tokens that leave their node, %": [curve("", BLUE, "crossing_share", 100)],
        "MB of tokens a step": [
            curve("nodes", ORANGE, "node_bytes", 1e-6),
            curve("within nodes", BLUE, "local_bytes", 1e-6),
        ],
    }
    frame = frame_of(entries)
    drawn = (draw(title, curves, frame, SMALL, zero=True) for title, curves in panels.items())
    return [picture for picture in drawn if picture]
