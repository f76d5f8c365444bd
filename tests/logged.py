"""What runs leave in `metrics.jsonl` and as a result, made up: a complete one, and one of old."""

from dataclasses import replace
from pathlib import Path

from dsv3_jax.config.presets import tiny_run
from dsv3_jax.train.report import Result

GROUPS = "embedding head attention dense router experts shared norm mtp".split()
RESULT = Result(
    run_folder=Path("runs/tiny-001"),
    steps=400,
    tokens=819_200,
    seconds=231.4,
    tokens_per_second=3540.0,
    matmul_share=0.18,
    validation_loss=2.08,
    bits_per_byte=1.5,
    zlib_bits_per_byte=2.0,
    validation_bytes=195_312,
    sample_prompt="def ",
    sample_text="add(self, name):\n    return name\n",
    picture=Path("runs/tiny-001/curves.png"),
    checkpoint=Path("runs/tiny-001/checkpoints/400"),
)
CFG = replace(tiny_run(), train=replace(tiny_run().train, steps=400))


def make_entries(count: int = 40, experts: int = 4, layers: int = 3) -> list[dict]:
    """A run of 400 steps that logs all there is."""
    made = []
    for i in range(1, count + 1):
        place = {"step": 400 * i // count, "tokens": 819_200 * i // count}
        loss = 2 + 5 / i
        made.append(
            place
            | {"kind": "train", "rows": 8 * i, "step_rows": 8, "loss": 1.3 * loss}
            | {"main_loss": loss, "mtp_loss": 1.1 * loss, "balance_loss": 8.0, "grad_norm": 1.0}
            | {"grad_norms": {name: 0.1 * (j + 1) for j, name in enumerate(GROUPS)}}
            | {"learning_rate": 1e-3, "bias_speed": 3e-3, "mtp_weight": 0.3}
            | {"tokens_per_second": 3500.0, "matmul_share": 0.18, "max_violation": 1.5 / i}
            | {"bias_min": -0.1 * i, "bias_max": 0.1 * i, "data_wait": 0.01}
            | {"peak_memory": 1_600_000_000, "device_peak_memory": None, "skipped": 0}
            | {"seconds": 5.0 * i}
        )
        if i % 5 == 0:
            load = [[50 + (e * 7 + i) % 11 for e in range(experts)] for _ in range(layers)]
            bias = [[0.01 * i * (e - 1) for e in range(experts)] for _ in range(layers)]
            names = [*(f"layers.{j + 1}" for j in range(layers - 1)), "mtp.0"]
            made.append(
                place | {"kind": "experts", "layers": names, "load_LE": load, "bias_LE": bias}
            )
            made.append(
                place
                | {"kind": "validation", "loss": loss, "bits_per_byte": loss / 2, "whole": False}
            )
            made.append(place | {"kind": "sample", "prompt": "def ", "text": f"sample {i}"})
    return made


OLD = [  # what the first version logged
    {"kind": "train", "step": 10, "tokens": 5120, "main_loss": 3.0, "mtp_loss": 0.0},
    {"kind": "validation", "step": 10, "tokens": 5120, "loss": 3.0, "bits_per_byte": 2.0},
]


def event(name: str, text: str = "rows of a.py") -> dict:
    """An event halfway."""
    return {"kind": "event", "step": 200, "tokens": 409_600, "event": name, "text": text}
