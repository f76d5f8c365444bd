"""The training loop on one device: steps, records, validations, checkpoints, a clean stop.

The loop keeps one step in flight: it hands the device the next step before it reads the results
of the last, so the device never waits for the host.
"""

import contextlib
import signal
import time
from collections.abc import Iterator
from itertools import repeat
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.checkpoint.names import to_layers
from dsv3_jax.config import RunConfig
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.loader import Batch, load
from dsv3_jax.plan.cost import train_flops_per_token
from dsv3_jax.train import snapshot
from dsv3_jax.train.folder import RunFolder
from dsv3_jax.train.metrics import MetricsLog, Progress
from dsv3_jax.train.schedules import learning_rate
from dsv3_jax.train.snapshot import Position
from dsv3_jax.train.step import Coefficients, StepMetrics, TrainState, make_step
from dsv3_jax.train.validation import Validation, make_validate, spread


class Trained(NamedTuple):
    """How the loop ended: the state, where it stood, and the signal that stopped it, if one did."""

    state: TrainState
    position: Position
    stopped_by: int | None


class Trainer:
    """One run from a position to its last step."""

    def __init__(
        self,
        cfg: RunConfig,
        run: RunFolder,
        corpus: Corpus,
        graphdef: nnx.GraphDef,
        matmul_peak: float,
    ) -> None:
        self.cfg, self.run, self.corpus = cfg, run, corpus
        self.flops_share = train_flops_per_token(cfg.model, cfg.data.length) / matmul_peak
        self.warned = False
        self.step = make_step(graphdef, cfg)
        self.validate = make_validate(graphdef, cfg, corpus.tokenizer.byte_lengths_V)
        self.data = {
            "content": corpus.content_hash,
            "tokenizer": corpus.tokenizer.content_hash,
        }

    def compile(self, state: TrainState) -> None:
        """Compiles the step ahead of the first batch, so that no step's time includes it."""
        rows = jax.ShapeDtypeStruct((self.cfg.train.rows, self.cfg.data.length), jnp.int32)
        self.step = self.step.lower(
            state, Batch(rows, rows), self.coefficients(Position())
        ).compile()

    def coefficients(self, position: Position) -> Coefficients:
        """What the schedules say of the next update."""
        cfg, schedule = self.cfg, self.cfg.schedule
        # Rows of the whole run as it will have been, whatever the batch was before a resume.
        rows = position.consumed_rows + (cfg.train.steps - position.step) * cfg.train.rows
        length = cfg.data.length
        consumed = position.consumed_rows * length
        rate = learning_rate(schedule, position.step, consumed, rows * length)
        return Coefficients(
            *(jnp.float32(x) for x in (rate, schedule.bias_speed, schedule.mtp_weight))
        )

    def train(
        self, state: TrainState, position: Position, log: MetricsLog, progress: Progress
    ) -> Trained:
        """Runs to `train.steps` or to SIGTERM or ^C; a checkpoint is there in each case."""
        saved = position.step or None  # step 0 may not be there yet
        clock = _Clock(position)
        batches = load(self.corpus.train, position.consumed_rows, repeat(self.cfg.train.rows))
        flight = None
        with _stop_signals() as stop, contextlib.closing(batches):
            while position.step < self.cfg.train.steps and not stop:
                coefficients = self.coefficients(position)
                state, metrics = self.step(state, jax.device_put(next(batches)), coefficients)
                rows = position.consumed_rows + self.cfg.train.rows
                position = Position(position.step + 1, rows)
                if flight:
                    self._record(*flight, clock, log, progress)
                flight = (position, coefficients, metrics)
                validate = self._due(position, self.cfg.output.eval_every)
                save = self._due(position, self.cfg.output.save_every)
                if not (validate or save):
                    continue
                self._record(*flight, clock, log, progress)
                flight = None
                with clock.paused():
                    if validate:
                        self._validate(state, position, log, progress)
                    if save:
                        self.save(state, clock.stamped(position))
                        saved = position.step
            if flight:
                self._record(*flight, clock, log, progress)
            position = clock.stamped(position)
            if saved != position.step:
                self.save(state, position)
        return Trained(state, position, stop[0] if stop else None)

    def save(self, state: TrainState, position: Position) -> None:
        """One checkpoint of this run."""
        snapshot.save(self.run.checkpoints, self.cfg, state, position, self.data)

    def _due(self, position: Position, every: int) -> bool:
        """The last step is validated and saved by whoever finishes the run."""
        return position.step % every == 0 and position.step < self.cfg.train.steps

    def _record(
        self,
        position: Position,
        coefficients: Coefficients,
        metrics: StepMetrics,
        clock: "_Clock",
        log: MetricsLog,
        progress: Progress,
    ) -> None:
        """Waits for a step's results and tells them."""
        metrics = jax.device_get(metrics)
        if not self.warned:
            self.warned = True
            for line in warnings_of(self.cfg, metrics):
                progress.message(f"warning: {line}")
        rate = clock.rate(position.step) * self.cfg.train.rows * self.cfg.data.length
        record = {
            "kind": "train",
            "step": position.step,
            "tokens": position.consumed_rows * self.cfg.data.length,
            "rows": position.consumed_rows,
            "loss": float(metrics.loss),
            "main_loss": float(metrics.parts.main),
            "mtp_loss": float(metrics.parts.mtp),
            "balance_loss": float(metrics.parts.balance),
            "grad_norm": float(metrics.grad_norm),
            "learning_rate": float(coefficients.learning_rate),
            "bias_speed": float(coefficients.bias_speed),
            "mtp_weight": float(coefficients.mtp_weight),
            "tokens_per_second": rate,
            "matmul_share": rate * self.flops_share,
            "max_violation": float(metrics.max_violation) if metrics.parts.load_LE.size else None,
            "seconds": clock.seconds(),
        }
        logged = (
            position.step in (1, self.cfg.train.steps)
            or position.step % self.cfg.output.log_every == 0
        )
        if logged:
            log.append(record)
        if logged or progress.live:
            progress.update(record)

    def _validate(
        self, state: TrainState, position: Position, log: MetricsLog, progress: Progress
    ) -> None:
        rows = self.corpus.validation
        result = self.validate(state, rows, spread(len(rows), self.cfg.output.eval_rows))
        record = validation_record(result, position, self.cfg, whole=result.rows == len(rows))
        log.append(record)
        progress.update(record)


def validation_record(
    result: Validation, position: Position, cfg: RunConfig, whole: bool
) -> dict[str, Any]:
    """The metrics entry of a validation."""
    tokens = position.consumed_rows * cfg.data.length
    return {"kind": "validation", "step": position.step, "tokens": tokens, "whole": whole} | (
        result._asdict()
    )


def warnings_of(cfg: RunConfig, metrics: StepMetrics) -> list[str]:
    """What is switched off or receives no gradient in a run's first step: rarely meant so."""
    routed = cfg.model.num_moe_layers + cfg.model.mtp_depth
    off = {
        "schedule.mtp_weight": cfg.model.mtp_depth and not cfg.schedule.mtp_weight,
        "schedule.bias_speed": routed and not cfg.schedule.bias_speed,
        "train.balance_weight": routed and not cfg.train.balance_weight,
    }
    lines = [f"{name} is 0" for name, is_off in off.items() if is_off]
    silent = to_layers(metrics.silent, cfg.model.num_dense_layers)
    names = sorted(name for name, zero in silent.items() if zero)
    if names:
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        lines.append(f"no gradient reaches {len(names)} of {len(silent)} parameters: {shown}")
    return lines


class _Clock:
    """Steps per second over the last few steps, validations and checkpoints left out."""

    WINDOW = 20

    def __init__(self, position: Position) -> None:
        self._idle, self._begin = 0.0, time.perf_counter() - position.seconds
        self._marks = [(position.step, position.seconds)]

    def seconds(self) -> float:
        """Of training, those before a resume included."""
        return time.perf_counter() - self._begin - self._idle

    def stamped(self, position: Position) -> Position:
        return position._replace(seconds=self.seconds())

    def rate(self, step: int) -> float:
        self._marks = [*self._marks[-self.WINDOW :], (step, self.seconds())]
        (first, then), (last, now) = self._marks[0], self._marks[-1]
        return (last - first) / max(now - then, 1e-9)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._idle += time.perf_counter() - start


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that holds the signal once SIGTERM or SIGINT has come.

    A second one acts as it always does.
    """
    came: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        came.append(number)
        signal.signal(number, previous[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
