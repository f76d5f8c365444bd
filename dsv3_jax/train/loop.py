"""The training loop: steps, records, validations, checkpoints, a clean stop.

On an accelerator the loop keeps one step in flight: it hands the device the next step before it
reads the results of the last, so the device never waits for the host. On CPUs both are the same
cores, and a step that begins as the last one ends holds the temporary memory of both.
"""

import contextlib
from collections import deque
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax import process
from dsv3_jax.checkpoint.arrays import CheckpointError
from dsv3_jax.config import RunConfig
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.parallel import processes
from dsv3_jax.plan.cost import train_flops_per_token
from dsv3_jax.train import ema, snapshot
from dsv3_jax.train.checkpoints import Checkpoints
from dsv3_jax.train.clock import Clock
from dsv3_jax.train.diagnose import first_bad_layer
from dsv3_jax.train.feed import Feed
from dsv3_jax.train.flight import WAITED_FOR, Flight, Trained
from dsv3_jax.train.folder import RunFolder
from dsv3_jax.train.lockstep import Lockstep
from dsv3_jax.train.output import Output
from dsv3_jax.train.page import tell_page
from dsv3_jax.train.pipeline_run import PipelineRun
from dsv3_jax.train.profile import Profile
from dsv3_jax.train.programs import StepPrograms
from dsv3_jax.train.quant_health import make_probe, not_finite
from dsv3_jax.train.records import (
    event_record,
    experts_record,
    pipeline_record,
    quant_record,
    sample_record,
    train_record,
    validation_record,
    warnings_of,
)
from dsv3_jax.train.samples import continuation
from dsv3_jax.train.schedules import Values, rows_after, values_at
from dsv3_jax.train.snapshot import Snapshot
from dsv3_jax.train.step import Coefficients, StepMetrics, TrainState
from dsv3_jax.train.trouble import BadSteps, SpikeMeter, said_of
from dsv3_jax.train.validation import spread
from dsv3_jax.train.watchdog import Watchdog


class Trainer:
    """One run from a snapshot to its last step."""

    def __init__(
        self,
        cfg: RunConfig,
        run: RunFolder,
        corpus: Corpus,
        graphdef: nnx.GraphDef,
        programs: StepPrograms | PipelineRun,
        start: Snapshot,
        matmul_peak: float,
        feed: Feed,
        *,
        debug_nans: bool = False,
        profile: Profile | None = None,
        hang_seconds: float = 0.0,
    ) -> None:
        self.cfg, self.run, self.corpus, self.graphdef = cfg, run, corpus, graphdef
        self.debug_nans, self.profile = debug_nans, profile or Profile.none()
        self.hang_seconds, self.doing = hang_seconds, lambda: "before its first step"
        self.flops_share = train_flops_per_token(cfg.model, cfg.data.length) / matmul_peak
        self.programs = programs
        self.probe, self.probed = make_probe(graphdef, cfg), False
        self.sharding, self.feed = programs.sharding, feed
        self.flights: deque[Flight] = deque()
        self.validate = programs.make_validate(corpus.tokenizer.byte_lengths_V)
        self.state, self.position = start.state, start.position
        self.meter = SpikeMeter(cfg.train, start.spike)
        self.average, self.update_average = None, None
        if cfg.optimizer.ema_decay:
            self.average = ema.on_host(start.average or self.state.params)
            self.update_average = ema.make_update(self.state.params, cfg.optimizer.ema_decay)
        data = {"content": corpus.content_hash, "tokenizer": corpus.tokenizer.content_hash}
        wanted = snapshot.wanted(cfg, programs.shapes)
        self.checkpoints = Checkpoints(cfg, run, data, self.position, wanted)
        self.lockstep, self.watchdog = Lockstep(self.sharding), None
        self.clock: Clock | None = None
        self.load_LE = start.load_LE  # since the last entry about experts
        self.bias_LE: np.ndarray | None = None
        self.warned, self.rewinds = False, []
        self._count_tokens()

    @property
    def snapshot(self) -> Snapshot:
        """Where the run stands now."""
        seconds = self.clock.seconds() if self.clock else self.position.seconds
        position = self.position._replace(seconds=seconds)
        kept = self.feed.kept()
        return Snapshot(self.state, position, self.average, self.meter.state, self.load_LE, kept)

    def whole_weights(self) -> TrainState | None:
        """Weights and biases on one device, for what knows of one; None in the processes that have
        not got it.
        """
        return self.sharding.on_one_device(self.state._replace(optimizer=()))

    def sample(self) -> str:
        """What the model writes now; nothing if no sample is wanted."""
        if not self.cfg.output.sample_tokens:
            return ""
        weights = self.whole_weights()
        text = weights and continuation(self.graphdef, weights, self.cfg, self.corpus)
        processes.wait("sample")
        return text or ""

    def train(self, out: Output) -> Trained:
        """Runs to `train.steps` or to SIGTERM or ^C, and saves that state.

        BadSteps after `train.max_bad_steps` updates in a row that were not made, or one that
        spoilt the weights: nothing is saved then.
        """
        self.clock = Clock(self.position.consumed_rows, self.position.seconds)
        self.feed.open(self.position.consumed_rows, self._batch_sizes())
        self.watchdog = Watchdog(out.message, lambda: self.doing(), self.hang_seconds)
        with self.lockstep.hearing(out.message), contextlib.closing(self.profile):
            try:
                self._steps(out)
            except OSError:  # the data: what was learned until here is kept
                if processes.count() == 1:  # others may be in the middle of the step
                    while self.flights:
                        self._take()
                    self.checkpoints.finish(self.snapshot, out)
                raise
            except Exception:
                self.checkpoints.settle(out)
                raise
            finally:
                self.feed.close()
                self.watchdog.close()
                self.checkpoints.close()  # while the run's folder is still held, a second ^C or not
            if self.position.step == self.cfg.train.steps and self.bias_LE is not None:
                self._tell_experts(out)
                self._tell_quant(out)
            unsaved = None
            try:
                self.checkpoints.finish(self.snapshot, out)
            except CheckpointError as error:
                unsaved = error
        return Trained(self.snapshot, self.lockstep.stopped_by, unsaved)

    def _steps(self, out: Output) -> None:
        """To the last step or a signal; none is in flight over a pause, or with --debug-nans."""
        wait_for_each = self.debug_nans or jax.default_backend() in WAITED_FOR
        wait_for_each |= self.feed.needs_weights
        while self.flights or self._goes_on():
            self.checkpoints.look(out)
            before = bool(self.flights)
            try:
                if self._goes_on():
                    self._launch()
            except OSError:
                if before and processes.count() == 1:
                    self._land(out)
                raise
            if before:
                self._land(out)
            lands = self.flights and (wait_for_each or self._pauses())
            if lands and not self._land(out):
                with self.clock.paused():
                    self._pause(out)

    def _goes_on(self) -> bool:
        return self.position.step < self.cfg.train.steps and not self.lockstep.stopped_by

    # --- one step --------------------------------------------------------------------------------

    def _launch(self) -> None:
        """Hands the next step to the device, unless a signal comes before there is a batch."""
        values = self._values()
        if values.rows not in self.programs:  # a stair of a batch ramp
            with self.clock.paused():
                self.programs.of(values.rows)
                process.give_back()
                processes.wait("compiled")
        self.doing = self.feed.where
        self.watchdog.begin(self.position.step + 1)
        with self.clock.waiting():
            batch = self.feed.batch(self.state, self.position, lambda: not self._goes_on())
        if batch is None:
            self.watchdog.forget()
            return
        self.doing = self.programs.where
        self.profile.before(self.position.step + 1)
        coefficients = self._coefficients(values)
        step = self.programs.of(values.rows)
        rows = self.sharding.put_rows(batch, values.rows)
        self.state, metrics = step(self.state, rows, coefficients)
        metrics, signals = self.lockstep.share(metrics)
        if self.update_average:
            self.average = self.update_average(self.average, self.state.params)
        rows = self.position.consumed_rows + values.rows
        self.position = self.position._replace(step=self.position.step + 1, consumed_rows=rows)
        self.profile.after(self.position.step, metrics)
        self.flights.append(Flight(self.position, values, metrics, signals, self.feed.told()))

    def _take(self) -> tuple[Flight, StepMetrics]:
        """Waits for the oldest step, and counts what it did. BadSteps if it spoilt the weights."""
        flight = self.flights.popleft()
        metrics = jax.device_get(flight.metrics)
        self.lockstep.take(flight.signals)
        self.watchdog.end()
        self.clock.mark(flight.position.consumed_rows)
        if not metrics.weights_are_finite:  # what went before the update is gone
            raise BadSteps(
                f"the weights are not finite after update {flight.position.step}, at a learning "
                f"rate of {flight.values.learning_rate:g}; {self.checkpoints.newest()}"
            )
        load_LE = metrics.parts.load_LE.astype(np.int64)
        self.load_LE = load_LE if self.load_LE is None else self.load_LE + load_LE
        self.bias_LE = metrics.bias_LE
        skipped, in_a_row = self.position.skipped + 1, self.position.skipped_in_a_row + 1
        if metrics.applied:
            skipped, in_a_row = self.position.skipped, 0
            self.meter.add(flight.position.step, float(metrics.parts.main))
        self.position = self.position._replace(skipped=skipped, skipped_in_a_row=in_a_row)
        return flight, metrics

    def _land(self, out: Output) -> bool:
        """Takes the oldest step's results and tells them. True if they made the run go back."""
        flight, metrics = self._take()
        if metrics.applied and not self.warned:
            self.warned = True
            for line in warnings_of(self.cfg, flight.values, metrics):
                out.event(event_record(self.cfg, flight.position, "warning", line))
        rewound = not metrics.applied and self._skipped(flight, metrics, out)
        position = flight.position._replace(skipped=self.position.skipped)
        record = train_record(
            self.cfg, position, flight.values, metrics, self.clock, self.flops_share
        )
        record |= flight.told
        step, every = position.step, self.cfg.output.log_every
        if measured := self.programs.measured():
            out.keep(pipeline_record(self.cfg, position, *measured))
        out.step(record, logged=step in (1, self.cfg.train.steps) or step % every == 0)
        return rewound

    def _values(self) -> Values:
        tokens = self.position.consumed_rows * self.cfg.data.length
        return values_at(self.cfg, self.position.step, tokens, self.total_tokens)

    def _coefficients(self, values: Values) -> Coefficients:
        limit = self.meter.limit(self.position.step + 1)
        rate, speed, weight, _ = values
        return Coefficients(*(jnp.float32(x) for x in (rate, speed, weight, limit)))

    def _batch_sizes(self) -> Iterator[int]:
        """Asked for the next batch, says how many rows it has: those of the step to come."""
        while True:
            yield self._values().rows

    def _count_tokens(self) -> None:
        """Of the whole run as it will have been, whatever the batch was before a resume."""
        left = self.cfg.train.steps - self.position.step
        rows = rows_after(self.cfg, self.position.consumed_rows, left)
        self.total_tokens = rows * self.cfg.data.length

    # --- trouble ---------------------------------------------------------------------------------

    def _skipped(self, flight: Flight, metrics: StepMetrics, out: Output) -> bool:
        """An update was not made: says why. True if the run went back; BadSteps if it is to end."""
        main = float(metrics.parts.main)
        is_spike = bool(np.isfinite(main) and np.isfinite(metrics.grad_norm))
        first = flight.position.consumed_rows - flight.values.rows
        rows = [first + int(b) for b in np.flatnonzero(~metrics.row_is_finite_B)]
        # Of a few rows, if all are bad: names may have to be read from shards.
        names = dict.fromkeys(name for row in rows[:8] for name in self.feed.names_of(row))
        total = flight.values.rows
        text = said_of(flight.position.step, main, rows, list(names), total, spike=is_spike)
        if self.debug_nans and not is_spike:
            text += f"; {self._bad_layer(rows[0] if rows else first)}"
        out.event(event_record(self.cfg, flight.position, "skipped", text))
        if is_spike and self.cfg.train.spike == "rewind" and self._rewind(flight, out):
            return True
        if self.position.skipped_in_a_row >= self.cfg.train.max_bad_steps:
            raise BadSteps(
                f"{self.position.skipped_in_a_row} updates in a row were skipped, the last in step "
                f"{flight.position.step} at a learning rate of {flight.values.learning_rate:g}; "
                f"{self.checkpoints.newest()}"
            )
        return False

    def _bad_layer(self, row: int) -> str:
        """Where one row stops being finite: the whole batch may not fit at once."""
        weights, one = self.whole_weights(), self.feed.one(row)
        text = weights and first_bad_layer(self.graphdef, weights, one, self.cfg.train)
        processes.wait("bad layer")
        return text or ""

    def _rewind(self, flight: Flight, out: Output) -> bool:
        """Back to the newest regular checkpoint, if there is one, and on with the rows after the
        spike's. BadSteps if that did not help several times.

        Regular ones alone, since a signal may have left others: a run that was stopped and resumed
        goes back to the same place as one that was not.
        """
        checkpoint = self.checkpoints.newest_regular(out)
        if checkpoint is None:
            return False
        back = checkpoint.step
        self.rewinds = [step for step in self.rewinds if step == back] + [back]
        if len(self.rewinds) > self.cfg.train.max_bad_steps:
            raise BadSteps(f"went back to step {back} {len(self.rewinds) - 1} times in vain")
        self.watchdog.forget()
        self.flights.clear()  # launched with the weights that are given up
        restored = snapshot.restore(checkpoint, self.cfg, self.state)
        self.state = restored.state
        self.position = restored.position._replace(
            consumed_rows=flight.position.consumed_rows, skipped=self.position.skipped
        )
        if self.update_average:
            self.average = ema.on_host(restored.average or restored.state.params)
        self.meter = SpikeMeter(self.cfg.train, restored.spike)
        self.feed.close()
        self.feed.open(self.position.consumed_rows, self._batch_sizes())
        self._count_tokens()
        text = f"back to the weights of step {self.position.step}, on with later data"
        out.event(event_record(self.cfg, self.position, "rewound", text))
        return True

    # --- validations and checkpoints -------------------------------------------------------------

    def _pauses(self) -> bool:
        """Whether something is due after this step, or to be compiled before the next."""
        output = self.cfg.output
        due = self._due(output.eval_every) or self._due(output.save_every)
        return due or self._values().rows not in self.programs

    def _due(self, every: int) -> bool:
        """The last step is validated and saved by whoever finishes the run."""
        return self.position.step % every == 0 and self.position.step < self.cfg.train.steps

    def _pause(self, out: Output) -> None:
        """What is due after this step."""
        if self._due(self.cfg.output.eval_every):
            rows = self.corpus.validation
            if rows is not None:
                chosen = spread(len(rows), self.cfg.output.eval_rows)
                result = self.validate(self.state, rows, chosen)
                whole = result.rows == len(rows)
                out.validation(validation_record(result, self.position, self.cfg, whole))
            self._tell_samples(out)
            self._tell_experts(out)
            self._tell_quant(out)
            tell_page(self.run, self.cfg, out.message)
        # Not in the middle of trouble: a resumed run would go straight on into it.
        if self._due(self.cfg.output.save_every) and not self.position.skipped_in_a_row:
            self.checkpoints.hand_over(self.snapshot, out)

    def _tell_samples(self, out: Output) -> None:
        """What the model writes, asked for or as it was trained on it."""
        text = self.sample()
        asked = [(self.cfg.output.sample_prompt, text)] if text else []
        for prompt, text in (*asked, *self.feed.samples()):
            out.keep(sample_record(self.cfg, self.position, prompt, text))

    def _tell_experts(self, out: Output) -> None:
        """Loads since the last time, and biases."""
        if self.load_LE is None or self.bias_LE is None or not self.load_LE.size:
            return
        out.keep(experts_record(self.cfg, self.position, self.load_LE, self.bias_LE))
        self.load_LE = None

    def _tell_quant(self, out: Output) -> None:
        """What low precision does to weights, inputs and gradients; not finite ones at once."""
        if not self.probe or self.corpus.validation is None:
            return
        if not self.probed:
            out.message("  compiling what measures low precision (up to a minute, once)")
            self.probed = True
        weight, weights = self._values().mtp_weight, self.whole_weights()
        layers = self.probe(weights, self.corpus.validation, weight) if weights else {}
        processes.wait("quant")
        out.keep(quant_record(self.cfg, self.position, layers))
        if text := not_finite(layers):
            out.event(event_record(self.cfg, self.position, "not finite", text))

    def save(self) -> None:
        """One checkpoint of this run. CheckpointError if it cannot be written."""
        self.checkpoints.save(self.snapshot)
