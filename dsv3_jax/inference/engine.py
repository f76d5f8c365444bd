"""Continuous batching: requests join and leave between any two steps (report 3.4).

A turn of the engine admits what has room, reads a chunk of at most one prompt on every device, or
of two as two micro-batches (prefill, in chunks), and goes on by one step, or several if nobody
waits for one (decoding). What is compiled depends on sizes of a few buckets alone, so nothing is
compiled once all of them were met. Attention is data-parallel; the report's TP4 with SP is left
out.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import count as ids
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dsv3_jax.inference.batch import chunk_of, lease_of
from dsv3_jax.inference.expert_service import ExpertService
from dsv3_jax.inference.handover import Handover, form_of
from dsv3_jax.inference.mover import Mover
from dsv3_jax.inference.programs import Programs, placed
from dsv3_jax.inference.requests import Answer, Request, Text, pairs
from dsv3_jax.inference.scheduler import Scheduler
from dsv3_jax.inference.settings import EngineConfig, bucket
from dsv3_jax.inference.speculative import Verdict
from dsv3_jax.inference.statistics import Statistics
from dsv3_jax.inference.step import MOST_STEPS, ReadScores
from dsv3_jax.inference.weights import Weights, check_alike, lay_out
from dsv3_jax.model.transformer import DeepSeekV3

# One call makes as many steps as it can in this time: a new request should not wait for longer.
PATIENCE = 0.05
STEADY_STEPS = 4  # of an engine that does not look at the clock: a text may end before the others
MOST_COUNTED = 2**28  # tokens that devices count in int32; a step with drafts has a few of each
SHORTEST_CHUNK, NARROWEST = 16, 4  # the least buckets of a chunk's tokens and a table's pages


class Engine:
    """Texts of many requests over one model's weights. For one thread."""

    def __init__(
        self,
        weights: Weights,
        settings: EngineConfig | None = None,
        mesh: Mesh | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """ValueError for settings that the model, its layout or the mesh does not allow."""
        self.settings = settings = settings or EngineConfig()
        cfg = weights.rest.cfg
        settings.check_model(cfg)
        if len(weights.depths) != settings.drafts:
            raise ValueError(
                f"engine.drafts is {settings.drafts}; allowed: {len(weights.depths)}, the MTP "
                "modules that are laid out"
            )
        none = [0] * settings.drafts
        self.statistics = Statistics(offered=none[:], accepted=none[:])
        self.service = ExpertService(cfg, settings, mesh, clock)
        self.programs = Programs(self.service.experts, mesh, settings, self.statistics)
        self.weights = placed(self.service.laid_out(weights), mesh)
        self.longest = min(cfg.max_length, settings.longest or cfg.max_length)
        pages = settings.num_pages(self.longest)
        self.scheduler = Scheduler(settings, self.programs.shards, pages, self.statistics)
        self.state = self.programs.empty_state(weights, settings, pages)
        self.mover = Mover(self.programs, self.scheduler)
        self._row_buckets = settings.buckets(settings.rows)
        chunk = min(settings.chunk, self.longest, pages * settings.page_slots)
        self._chunk_buckets = settings.buckets(chunk, min(SHORTEST_CHUNK, chunk))
        widest = min(pages, -(-self.longest // settings.page_slots))
        self._width_buckets = settings.buckets(widest, min(NARROWEST, widest))
        self._ids, self._steps = ids(), STEADY_STEPS if settings.steady else 1
        self._texts: dict[int, Text] = {}
        self._loads: np.ndarray | int = 0
        self._total_loads: np.ndarray | int = 0
        self._collected = 0

    @classmethod
    def of(
        cls,
        model: DeepSeekV3,
        settings: EngineConfig | None = None,
        mesh: Mesh | None = None,
        *,
        consume: bool = False,
    ) -> "Engine":
        """Over a model's weights, laid out for decoding; `consume` as of `lay_out`."""
        drafts = settings.drafts if settings else 0
        return cls(lay_out(model, consume=consume, drafts=drafts), settings, mesh)

    def take_weights(self, weights: Weights) -> None:
        """Goes on with other values of the same model's weights; nothing is compiled for them.

        ValueError, one line, while requests are pending, or for another model's.
        """
        if self.pending:
            raise ValueError(f"{self.pending} requests have not ended; allowed: none with weights")
        weights = self.service.laid_out(weights)
        check_alike(weights, self.weights)
        self.weights = placed(weights, self.programs.mesh)
        self.scheduler.forget()

    # --- requests --------------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """The request's id; its text begins as soon as there is room. ValueError, one line, for one
        that cannot be served; the engine goes on.
        """
        request = request.copied()
        limit = self.check(request)
        text = Text(next(self._ids), request, limit, [int(i) for i in request.prompt])
        self._texts[text.id] = text
        self.scheduler.waiting.append(text)
        return text.id

    def check(self, request: Request) -> int:
        """Most tokens that its text can have, of prompt and answer together. ValueError as of
        `submit`. Other threads may ask, too.
        """
        request.check(self.weights.rest.cfg.vocab_size, self.longest)
        limit = min(len(request.prompt) + request.max_tokens, self.longest)
        self.settings.check_request(request, limit, self.room)
        return limit

    @property
    def rows(self) -> int:
        """Texts that can go on at the same time, on all devices together."""
        return self.settings.rows * self.programs.shards

    @property
    def room(self) -> int:
        """Tokens of the longest text that can be served."""
        pool = self.scheduler.pages[0]
        return min(self.longest, pool.count * pool.page_slots)

    def cancel(self, request_id: int) -> bool:
        """Whether the request was still there; no later turn answers to it."""
        text = self._texts.pop(request_id, None)
        if text is not None:
            self._leave(text)
        return text is not None

    @property
    def pending(self) -> int:
        """Requests that have not ended."""
        return len(self._texts)

    def run(self) -> Iterator[Answer]:
        """Turns until every request has ended. What is cancelled or handed over between two answers
        has no further one.
        """
        while self.pending:
            for answer in self.turn():
                if answer.ended or answer.id in self._texts:
                    yield answer

    def turn(self) -> list[Answer]:
        """Goes on for a moment. New tokens of each request that has some, one answer each."""
        answers = {answer.id: answer for answer in self.read_prompts()}
        for answer in self.go_on():
            if answer.id in answers:
                answers[answer.id].add(answer)
            else:
                answers[answer.id] = answer
        return list(answers.values())

    def read_prompts(self) -> list[Answer]:
        """A turn in which nobody goes on, all that an engine for prompts does: the first tokens of
        requests that are read. Until they are handed over or cancelled they keep rows and pages.
        """
        if self.statistics.tokens - self._collected > MOST_COUNTED:
            self._collect_loads()
        if self.service.due:
            self.service.place(self.take_loads())
        self.weights = self.service.move(self.weights)
        self.scheduler.admit()
        self.state = self.mover.take_in(self.weights, self.state)
        readers = self.scheduler.readers()
        return self._read(readers) if any(readers) else []

    def warm_up(self, told: Callable[[int, int], None] = lambda done, all_: None) -> None:
        """Compiles a program for every size that can occur, with rows in which nobody is. `told` is
        called with how many are done, of how many.
        """
        self.service.warm_up(self.weights)
        shards, widths = self.programs.shards, self._width_buckets
        reads = [
            (size, width, fresh)
            for least, size in zip((0, *self._chunk_buckets), self._chunk_buckets, strict=False)
            for width in widths
            for fresh in (True, False)
            if width >= self._width(least + 1) and (not fresh or width <= self._width(size))
        ]
        goes = [(rows, width) for rows in self._row_buckets for width in widths]
        for done, (size, width, fresh) in enumerate(reads):
            told(done, len(reads) + len(goes))
            turns = [[None] * shards] * self.settings.prompt_microbatches
            self._run_read(turns, {}, size, width, fresh)
        for done, (rows, width) in enumerate(goes, start=len(reads)):
            told(done, len(reads) + len(goes))
            self._run_go_on([None] * (shards * rows), width, 0)
        self.state = self.mover.warm_up(self.weights, self.state)
        told(len(reads) + len(goes), len(reads) + len(goes))

    def take_loads(self) -> np.ndarray:
        """Tokens of every router's experts since the last time, int64 [L, E']: those of the main
        model's layers, then of MTP's; with the shared experts behind, if they are routed.
        """
        self._collect_loads()
        taken_LE, self._loads = self._loads, np.zeros_like(self._loads)
        return taken_LE

    def total_loads(self) -> np.ndarray:
        """As `take_loads`, since the beginning; nothing is taken."""
        self._collect_loads()
        return self._total_loads.copy()

    def _collect_loads(self) -> None:
        """Devices count in int32, which is collected before it can be full."""
        load_XE = np.asarray(self.state.load_LE, np.int64)
        self.state = self.state._replace(load_LE=self.programs.no_loads(self.state))
        shards, (rows, experts) = self.programs.shards, load_XE.shape
        load_LE = load_XE.reshape(shards, rows // shards, experts).sum(0)
        self._loads = self._loads + load_LE
        self._total_loads = self._total_loads + load_LE
        self._collected = self.statistics.tokens

    # --- hand-over -------------------------------------------------------------------------------

    @cached_property
    def form(self) -> dict[str, Any]:
        """What another engine must have too, to hand texts over or take them."""
        return form_of(self.weights, self.settings)

    def hand_over(self, request_id: int) -> Handover:
        """A text that is read, for another engine to go on with; it leaves this one (report 3.4).

        ValueError, one line, for a request that is not here or not read, and nothing has changed.
        """
        text = self._texts.get(request_id)
        if text is None or not text.answered or text.unread:
            state = "is not here" if text is None else f"has {text.unread} tokens to be read"
            raise ValueError(f"request {request_id} {state}; allowed: one with a first token")
        self.state, handover = self.mover.take_out(self.weights, self.state, text, self.form)
        del self._texts[request_id]
        self._leave(text)
        return handover

    def take_over(self, handover: Handover) -> int:
        """The id here of a request that another engine has read. It waits its turn as any other;
        answers go on behind the hand-over's tokens.

        ValueError, one line, for one of another model, other drafts or another cache.
        """
        handover.check(self.form, self.state.pools)
        text = self._texts[self.submit(handover.request)]
        text.tokens, text.logprobs = list(handover.tokens), list(handover.logprobs)
        text.handover = handover
        return text.id

    # --- prompts ---------------------------------------------------------------------------------

    def _read(self, readers: Sequence[Sequence[Text]]) -> list[Answer]:
        """One chunk of each. Answers of those that are read to the end."""
        texts = [text for shard in readers for text in shard]
        counts = {text.id: min(text.unread, self.settings.chunk) for text in texts}
        size = bucket(max(counts.values()), self._chunk_buckets)
        width = self._width(max(text.read + counts[text.id] for text in texts))
        fresh = all(text.read == 0 for text in texts)
        microbatches = range(self.settings.prompt_microbatches)
        turns = [[shard[i] if i < len(shard) else None for shard in readers] for i in microbatches]
        verdicts, scores = self._run_read(turns, counts, size, width, fresh)
        answers = []
        for micro, (turn, verdict) in enumerate(zip(turns, verdicts, strict=True)):
            for place, text in enumerate(turn):
                if text is not None:
                    if text.scores:
                        text.score(counts[text.id], scores[micro], place)
                    self._has_read(text, counts[text.id])
                    if not text.unread and not text.answered:
                        answers.append(self._take_first(text, verdict, place))
        return answers

    def _run_read(
        self,
        turns: Sequence[Sequence[Text | None]],
        counts: dict[int, int],
        size: int,
        width: int,
        fresh: bool,
    ) -> tuple[list[Verdict], list[ReadScores]]:
        chunks = [chunk_of(turn, counts, size, self.settings.drafts) for turn in turns]
        leases = [lease_of(turn, width, self.settings.page_slots) for turn in turns]
        with self.statistics.measured("reading"):
            self.state, verdicts, scores = self.programs.read(
                self.weights, self.state, chunks, leases, fresh
            )
            if not any(chunk.scored_B.any() for chunk in chunks):
                scores = []
            return jax.tree.map(np.asarray, (verdicts, scores))

    def _has_read(self, text: Text, count: int) -> None:
        self.statistics.read += count
        self.statistics.borrowed += 0 if text.began else text.read
        text.read, text.began = text.read + count, True
        self.scheduler.tell(text)

    # --- steps -----------------------------------------------------------------------------------

    def go_on(self) -> list[Answer]:
        """A turn in which no prompt is read: new tokens of all texts that are."""
        goers = self.scheduler.goers()
        steps = 1 if self._somebody_waits() else self._steps
        left = max((text.limit - len(text.tokens) for text in goers), default=0)
        # As many as the longest text needs, if drafts hold as they have so far.
        steps = min(steps, math.ceil(left / (1 + (self.statistics.accepted_a_step or 0))))
        a_step = 1 + len(self.weights.depths)
        while steps > 1 and not self.scheduler.has_room(steps * a_step):
            steps //= 2
        texts = self.scheduler.make_room(steps * a_step)
        if not texts:
            return []
        rows = bucket(1 + max(text.row for text in texts), self._row_buckets)
        grid: list[Text | None] = [None] * (self.programs.shards * rows)
        for text in texts:
            grid[text.shard * rows + text.row] = text
        width = self._width(max(len(text.pages) for text in texts) * self.settings.page_slots)
        before = self.statistics.going_on
        verdict = self._run_go_on(grid, width, steps)
        fitting = steps * PATIENCE / (self.statistics.going_on - before)
        if not self.settings.steady:
            self._steps = min(max(int(fitting), 1), MOST_STEPS)
        return [
            self._take_steps(text, steps, verdict, place)
            for place, text in enumerate(grid)
            if text is not None
        ]

    def _run_go_on(self, grid: Sequence[Text | None], width: int, steps: int) -> Verdict:
        active_B = np.array([text is not None for text in grid])
        lease = lease_of(grid, width, self.settings.page_slots)
        with self.statistics.measured("going_on"):
            self.state, verdict = self.programs.go_on(
                self.weights, self.state, lease, active_B, steps
            )
            return jax.tree.map(np.asarray, verdict)

    def _somebody_waits(self) -> bool:
        return bool(self.scheduler.waiting) or any(self.scheduler.readers())

    # --- both ------------------------------------------------------------------------------------

    def _leave(self, text: Text) -> None:
        self.statistics.requests += 1
        self.scheduler.leave(text)

    def _width(self, slots: int) -> int:
        """Pages of a table that has so many slots."""
        return bucket(self.scheduler.pages[0].needed(slots), self._width_buckets)

    def _take_first(self, text: Text, verdict: Verdict, place: int) -> Answer:
        """The token behind a prompt."""
        answer = Answer(text.id, prompt=text.scores)
        text.scores = None
        self._take(text, answer, verdict, place)
        return self._told(text, answer)

    def _take_steps(self, text: Text, steps: int, verdicts: Verdict, place: int) -> Answer:
        """What steps have brought a row's text, up to its end."""
        answer = Answer(text.id)
        for i in range(steps):
            verdict = jax.tree.map(lambda x, i=i: x[i], verdicts)
            allowed = min(text.limit - 1 - len(text.tokens), self.settings.drafts)
            self.statistics.step(allowed, int(verdict.taken_B[place]))
            self._take(text, answer, verdict, place)
            if answer.ended:
                break
        return self._told(text, answer)

    def _take(self, text: Text, answer: Answer, verdict: Verdict, place: int) -> None:
        taken = int(verdict.taken_B[place])
        tokens = verdict.token_BJ[place, :taken].tolist()
        count, answer.ended = text.take(tokens)
        answer.tokens += tokens[:count]
        answer.logprobs += verdict.logprob_BJ[place, :count].tolist()
        answer.top += pairs(verdict.top_BJn[place, :count], verdict.top_logprob_BJn[place, :count])

    def _told(self, text: Text, answer: Answer) -> Answer:
        text.logprobs += answer.logprobs
        text.read = len(text.tokens) - 1
        self.statistics.written += len(answer.tokens)
        if answer.ended:
            del self._texts[text.id]
            self._leave(text)
        return answer
