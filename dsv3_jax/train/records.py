"""The entries of `metrics.jsonl`: what a run tells of its steps, validations, experts and troubles.

Every entry has `kind`, `step` (updates done) and `tokens` (consumed until then).
"""

from typing import Any

import numpy as np

from dsv3_jax.checkpoint.names import to_layers
from dsv3_jax.config import RunConfig
from dsv3_jax.parallel.schedules import Schedule
from dsv3_jax.train.clock import Clock
from dsv3_jax.train.exchange_records import exchange_entry
from dsv3_jax.train.machine import device_peak_memory, peak_memory
from dsv3_jax.train.quant_health import Health, HealthByLayer
from dsv3_jax.train.schedules import Values, never_reached
from dsv3_jax.train.snapshot import Position
from dsv3_jax.train.step import StepMetrics
from dsv3_jax.train.validation import Validation


def train_record(
    cfg: RunConfig,
    position: Position,
    values: Values,
    metrics: StepMetrics,
    clock: Clock,
    flops_share: float,
) -> dict[str, Any]:
    """Of one step, whose metrics are on the host; `flops_share`: of the peak, per token/s."""
    rate = clock.rows_per_second() * cfg.data.length
    violation_L = metrics.max_violation_L
    bias_LE = metrics.bias_LE
    entry = _entry("train", cfg, position) | {
        "rows": position.consumed_rows,
        "step_rows": values.rows,
        "loss": float(metrics.loss),
        "main_loss": float(metrics.parts.main),
        "mtp_loss": float(metrics.parts.mtp),
        "balance_loss": float(metrics.parts.balance),
        "grad_norm": float(metrics.grad_norm),
        "grad_norms": {part: float(norm) for part, norm in metrics.grad_norms.items()},
        "learning_rate": values.learning_rate,
        "bias_speed": values.bias_speed,
        "mtp_weight": values.mtp_weight,
        "max_violation": float(violation_L.mean()) if violation_L.size else None,
        "bias_min": float(bias_LE.min()) if bias_LE.size else None,
        "bias_max": float(bias_LE.max()) if bias_LE.size else None,
        "tokens_per_second": rate,
        "matmul_share": rate * flops_share,
        "data_wait": clock.data_wait(),
        "peak_memory": peak_memory(),
        "device_peak_memory": device_peak_memory(),
        "skipped": position.skipped,
        "seconds": clock.seconds(),
    }
    if metrics.traffic:
        entry["exchange"] = exchange_entry(cfg, values.rows, metrics.traffic)
    return entry


def validation_record(
    result: Validation, position: Position, cfg: RunConfig, whole: bool
) -> dict[str, Any]:
    return _entry("validation", cfg, position) | {"whole": whole} | result._asdict()


def experts_record(
    cfg: RunConfig, position: Position, load_LE: np.ndarray, bias_LE: np.ndarray
) -> dict[str, Any]:
    """Token copies per expert since the last such entry, and the routers' biases now."""
    model = cfg.model
    layers = [f"layers.{i}" for i in range(model.num_dense_layers, model.num_layers)]
    layers += [f"mtp.{k}" for k in range(model.mtp_depth)]
    return _entry("experts", cfg, position) | {
        "layers": layers,
        "load_LE": load_LE.tolist(),
        "bias_LE": np.round(bias_LE.astype(float), 6).tolist(),
    }


def quant_record(cfg: RunConfig, position: Position, layers: HealthByLayer) -> dict[str, Any]:
    """Of each quantised parameter, by layer, what low precision does to its tensors: for weight,
    input and output's gradient the values of `Health`.
    """
    return _entry("quant", cfg, position) | {
        "recipe": cfg.quant.recipe,
        "fields": list(Health._fields),
        "layers": {
            name: {kind: [float(f"{v:.4g}") for v in health] for kind, health in kinds.items()}
            for name, kinds in layers.items()
        },
    }


def pipeline_record(
    cfg: RunConfig, position: Position, schedule: Schedule, seconds: dict[str, Any]
) -> dict[str, Any]:
    """Of one step's pipeline: what ran, and by kind and rank what an operation took."""
    return _entry("pipeline", cfg, position) | {
        "schedule": schedule.name,
        "ranks": schedule.ranks,
        "microbatches": schedule.microbatches,
        "seconds": seconds,
    }


def event_record(cfg: RunConfig, position: Position, event: str, text: str) -> dict[str, Any]:
    return _entry("event", cfg, position) | {"event": event, "text": text}


def sample_record(cfg: RunConfig, position: Position, prompt: str, text: str) -> dict[str, Any]:
    return _entry("sample", cfg, position) | {"prompt": prompt, "text": text}


def _entry(kind: str, cfg: RunConfig, position: Position) -> dict[str, Any]:
    tokens = position.consumed_rows * cfg.data.length
    return {"kind": kind, "step": position.step, "tokens": tokens}


def warnings_of(cfg: RunConfig, values: Values, metrics: StepMetrics) -> list[str]:
    """What is switched off, does not move or receives no gradient in a run's first update.

    Whoever trains on conversations or prompts leaves biases alone, and on prompts MTP too.
    """
    routed, learned = cfg.model.num_moe_layers + cfg.model.mtp_depth, cfg.data.format
    no_mtp = cfg.model.mtp_depth and not values.mtp_weight
    off = {
        "schedule.mtp_weight": no_mtp and learned != "prompts",
        "schedule.bias_speed": routed and not values.bias_speed and learned == "text",
        "train.balance_weight": routed and not cfg.train.balance_weight,
    }
    lines = [f"{name} is 0" for name, is_off in off.items() if is_off]
    lines += never_reached(cfg)
    warm, steps = cfg.schedule.warmup_steps, cfg.train.steps
    if warm > steps:
        lines.append(f"the warm-up of {warm:,} steps is longer than the run of {steps:,}")
    if cfg.mesh.node > 1 and cfg.model.num_groups == 1 and routed:
        nodes = min(cfg.model.experts_per_token, cfg.mesh.node)
        lines.append(
            "routing is not limited (model.num_groups is 1): a token may go to "
            f"{nodes} of {cfg.mesh.node} nodes"
        )
    still = int((~metrics.bias_moved_L).sum())
    if values.bias_speed and still:
        lines.append(f"the bias of {still} of {len(metrics.bias_moved_L)} routers did not move")
    squares = to_layers(metrics.squared_norms, cfg.model.num_dense_layers)
    if no_mtp:
        squares = {name: x for name, x in squares.items() if not name.startswith("mtp.")}
    names = sorted(name for name, square in squares.items() if square == 0)
    if names:
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        why = " (there is none if each group's rewards are equal)" if learned == "prompts" else ""
        lines.append(f"no gradient reaches {len(names)} of {len(squares)} parameters{why}: {shown}")
    return lines
