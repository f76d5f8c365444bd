"""Batches that a run's own weights make: answers drawn, rated, scored, and weighed as labels
(report 5.2.2).

The first process draws and rates; all others hear of it, and all score and weigh alike. Whatever is
drawn is a function of the weights, the seed and the number of the batch, so a resumed run draws the
same. Between two updates on one batch a checkpoint holds the batch.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from dsv3_jax.checkpoint import joint
from dsv3_jax.config.grpo import GrpoConfig
from dsv3_jax.data.loader import Batch
from dsv3_jax.files import replace_file
from dsv3_jax.parallel import processes
from dsv3_jax.posttrain.grpo_answers import Answers, lines_of
from dsv3_jax.posttrain.grpo_objective import (
    Drift,
    LogProbs,
    advantages,
    drift,
    label_weights,
    sums_of,
    weighed,
)
from dsv3_jax.posttrain.rewards import Rewards
from dsv3_jax.posttrain.rl_prompts import chosen
from dsv3_jax.posttrain.rl_rows import Packed, pack
from dsv3_jax.posttrain.rollouts import Drawing, Rollouts
from dsv3_jax.quant.wide import wide
from dsv3_jax.train import ema, snapshot
from dsv3_jax.train.snapshot import Position, Snapshot
from dsv3_jax.train.step import TrainState, abstract_state
from dsv3_jax.train.trouble import NoBatch

if TYPE_CHECKING:
    from dsv3_jax.train.pipeline_run import PipelineRun
    from dsv3_jax.train.programs import StepPrograms
    from dsv3_jax.train.start import Prepared

WEIGHTS = ("params", "router_bias")
QUIET_SECONDS = 30.0  # between two lines of progress
ANSWERS = "answers"  # folder of a run
WORD = 2**18  # most characters of a word between processes; gRPC refuses 4 MiB


class _Stopped(Exception):
    """The run is to end; a resumed one draws these answers anew."""


class GrpoFeed:
    """A `train.feed.Feed`."""

    needs_weights = True

    def __init__(
        self,
        settings: GrpoConfig,
        rewards: Rewards,
        prepared: "Prepared",
        programs: "StepPrograms | PipelineRun",
        start: Snapshot,
        say: Callable[[str], None],
    ) -> None:
        self.settings, self.rewards, self.say = settings, rewards, say
        self.cfg, self.run, self.prompts = prepared.cfg, prepared.run, prepared.corpus.prompts
        self.corpus, self.programs = prepared.corpus, programs
        self.sharding, self.scores = programs.sharding, programs.make_scores()
        self.reference = self._reference(prepared, start) if settings.kl else None
        self.answers: Answers | None = None
        if start.feed is not None:
            self.answers = Answers.of_json(start.feed.tobytes().decode())
        self._packed: Packed | None = None
        self._updates, self._first_row = start.position.step, start.position.consumed_rows
        self._told: dict[str, Any] = {}
        self._doing = "before its first answers"

    def _reference(self, prepared: "Prepared", start: Snapshot) -> TrainState:
        """The weights that the run began with, in host memory: those of step 0."""
        if prepared.is_new:
            state = start.state._replace(optimizer=())
        else:
            shapes = self.programs.shapes
            found = joint.load(
                self.run.checkpoints, 0, WEIGHTS, wanted=snapshot.wanted(self.cfg, shapes)
            )
            state = snapshot.weights_in(found, self.cfg, shapes)
        return ema.on_host(state)

    # --- as a Feed -------------------------------------------------------------------------------

    def open(self, consumed_rows: int, sizes: Iterable[int]) -> None:
        self._first_row = consumed_rows

    def batch(
        self, state: TrainState, position: Position, stopped: Callable[[], bool]
    ) -> Batch | None:
        """The next one; None if the run was stopped while answers were drawn. NoBatch if every
        reward failed, or if the engine and the training disagree about most answers.
        """
        number, update = divmod(position.step, self.settings.updates)
        if self.answers is None or self.answers.number != number:
            assert update == 0, (position.step, self.settings.updates)
            try:
                self.answers, self._packed = self._drawn(state, position, stopped), None
            except _Stopped:
                return None
        begun = time.perf_counter()
        self._doing = "scoring answers"
        batch, places = self.packed
        logp_BT = self.scores(state, batch)
        new_N = sums_of(logp_BT, places)
        if update == 0:
            self._look(logp_BT, new_N)
        reference = self.answers.reference
        logs = LogProbs(
            new_N, np.array(self.answers.old), None if reference is None else np.array(reference)
        )
        found = weighed(self._advantage_N, logs, self.settings.clip, self.settings.kl)
        counts_N = ~np.array(self.answers.left_out)
        weight_N = np.where(counts_N, found.weight_N, 0.0)
        dtype = np.dtype(wide(jnp.dtype(self.cfg.train.dtype)))
        weights_BT = label_weights(weight_N, places, batch.labels_BT, dtype)
        scoring = {"scores": time.perf_counter() - begun}
        told = self.answers.told()
        self._told = {
            "reward": float(np.mean(self.answers.rewards)),
            "kl": float(found.kl_N[counts_N].mean()),
            "grpo": {
                **told,
                "update": update,
                "objective": float(found.objective_N[counts_N].mean()),
                "ratio": float(found.ratio_N[counts_N].mean()),
                "clipped": float(found.is_clipped_N[counts_N].mean()),
                "left_out": float(np.mean(self.answers.left_out)),
                **self.answers.drift,
                "seconds": {**told["seconds"], **scoring},
            },
        }
        self._updates, self._first_row = position.step + 1, position.consumed_rows
        own = np.array(self.sharding.own_rows(len(batch.labels_BT)))
        return Batch(*(x[own] for x in batch._replace(weights_BT=weights_BT)))

    def told(self) -> dict[str, Any]:
        return self._told

    def samples(self) -> list[tuple[str, str]]:
        """The first answer of the newest batch."""
        if self.answers is None:
            return []
        group = self.answers.groups[0]
        return [(f"{self.prompts.prompts[group.prompt].prompt}\n", group.outputs[0].text)]

    def kept(self) -> np.ndarray | None:
        """The batch, between two updates on it."""
        if self._updates % self.settings.updates == 0:
            return None
        return np.frombuffer(self.answers.to_json().encode(), np.uint8)

    def names_of(self, row: int) -> Sequence[str]:
        """Prompts of a row of the newest batch."""
        place, groups = row - self._first_row, self.answers.groups
        ids = [self.prompts.prompts[group.prompt].id for group in groups for _ in group.outputs]
        found = (
            f"prompt {name}"
            for name, where in zip(ids, self.packed.places, strict=True)
            if where.row == place
        )
        return list(dict.fromkeys(found))

    def one(self, row: int) -> Batch:
        place = row - self._first_row
        batch = self.packed.batch._replace(weights_BT=None)
        return Batch(*(None if x is None else x[place : place + 1] for x in batch))

    def where(self) -> str:
        return self._doing

    def close(self) -> None:
        self.rewards.close()

    # --- answers ---------------------------------------------------------------------------------

    @property
    def packed(self) -> Packed:
        """The newest answers as rows."""
        if self._packed is None:
            length, eos_id = self.cfg.data.length, self.corpus.tokenizer.eos_id
            groups = self.answers.groups
            self._packed = pack(self.prompts, groups, length, self.cfg.train.rows, eos_id)
        return self._packed

    @property
    def _advantage_N(self) -> np.ndarray:
        return advantages(self.answers.rewards_PG).ravel()

    def _drawn(self, state: TrainState, position: Position, stopped: Callable[[], bool]) -> Answers:
        """A new batch, in all processes. NoBatch if all its rewards failed."""
        number = position.step // self.settings.updates
        weights = self.sharding.on_one_device(state._replace(optimizer=()))
        make = partial(self._rated, weights, number, position, stopped)
        answers = Answers.of_json(told_to_all(lambda: make().to_json()))
        if all(answers.failed):
            reason = next(iter(answers.reasons), "no reason")
            raise NoBatch(
                f"all {len(answers.failed)} rewards of step {position.step + 1} failed: {reason}"
            )
        return answers

    def _rated(
        self, weights: TrainState, number: int, position: Position, stopped: Callable[[], bool]
    ) -> Answers:
        count, seed = self.settings.prompts_per_step, self.cfg.train.seed
        which = chosen(len(self.prompts.prompts), seed, number, count)
        begun = time.perf_counter()
        groups = self.rollouts.groups(weights, which, number, self._heard(stopped))
        drawn = time.perf_counter()
        self._doing = "rating answers"
        totals = self.rewards.rate(self.rollouts.attempts(groups))
        seconds = {"answers": drawn - begun, "rewards": time.perf_counter() - drawn}
        answers = Answers.rated(number, groups, totals, seconds)
        if -position.step % self.cfg.output.eval_every < self.settings.updates:
            self._write(answers, totals, position.step + 1)
        return answers

    def _write(self, answers: Answers, totals: Sequence[Any], step: int) -> None:
        """Answers and their rewards, for people."""
        asked = [
            {"id": one.id, "prompt": one.prompt}
            for one in (self.prompts.prompts[group.prompt] for group in answers.groups)
        ]
        advantage_N = advantages(answers.rewards_PG).ravel()
        folder = self.run.path / ANSWERS
        folder.mkdir(exist_ok=True)
        lines = lines_of(answers, asked, totals, advantage_N)
        replace_file(folder / f"step_{step:08d}.jsonl", "".join(f"{x}\n" for x in lines).encode())

    def _heard(self, stopped: Callable[[], bool]) -> Callable[[int, int], None]:
        """What hears of answers that have ended; it raises _Stopped."""
        said = time.monotonic()

        def told(ended: int, total: int) -> None:
            nonlocal said
            if stopped():
                raise _Stopped
            self._doing = f"drawing answers: {ended} of {total} have ended"
            if time.monotonic() - said >= QUIET_SECONDS:
                said = time.monotonic()
                self.say(f"  {self._doing}")

        return told

    @cached_property
    def rollouts(self) -> Rollouts:
        """In the first process."""
        settings = self.settings
        drawing = Drawing(
            group=settings.group,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=self.cfg.train.seed,
            rows=min(settings.outputs, 64),
        )
        return Rollouts(
            self.cfg,
            abstract_state(self.cfg)[0],
            self.corpus.tokenizer,
            self.prompts,
            drawing,
            self.corpus.end_ids | {self.cfg.model.eos_id},
        )

    def _look(self, logp_BT: np.ndarray, new_N: np.ndarray) -> None:
        """Before the first update on answers: their log-probabilities by this policy and by the
        reference, and how far the engine's were off. NoBatch if they were for most.
        """
        answers, (batch, places) = self.answers, self.packed
        found = drift(logp_BT, places, [output.logprobs for output in answers.outputs])
        left_out_N = found.mean_N > self.settings.max_difference
        if left_out_N.mean() > 0.5:
            raise NoBatch(
                f"{left_out_N.sum()} of {len(left_out_N)} answers have log-probabilities in the "
                f"engine that are more than --max-difference {self.settings.max_difference:g} nats "
                f"a token off those of training (median {np.median(found.mean_N):.3g}); allowed: "
                "at most half of them"
            )
        answers.old, answers.left_out = new_N.tolist(), left_out_N.tolist()
        answers.drift = _described(found)
        if self.reference is not None:
            reference = ema.in_device_memory(self.reference)
            answers.reference = sums_of(self.scores(reference, batch), places).tolist()


def told_to_all(make: Callable[[], str]) -> str:
    """What `make` returns in the first process, in all of them, however long. Errors as of
    `processes.of_first`.
    """
    made: list[str] = []

    def count() -> str:
        made.append(make())
        return str(-(-len(made[0]) // WORD))

    words = int(processes.of_first("answers", count))
    starts = range(0, words * WORD, WORD)
    return "".join(
        processes.of_first("answers", lambda start=start: made[0][start : start + WORD])
        for start in starts
    )


def _described(found: Drift) -> dict[str, float]:
    finite_N = found.mean_N[np.isfinite(found.mean_N)]
    return {
        "drift": float(finite_N.mean()) if finite_N.size else float("inf"),
        "drift_most": float(found.most_N.max()),
        "drift_ratio": float(found.ratio_N.mean()),
    }
