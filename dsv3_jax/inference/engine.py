"""Continuous batching: requests join and leave between any two steps (report 3.4).

A turn of the engine admits what has room, reads at most one chunk of prompts on every device, and
goes on by one step, or several if nobody waits for one. What is compiled depends on sizes of a few
buckets alone, so nothing is compiled once all of them were met.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count as ids
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dsv3_jax.inference.programs import Programs, make_experts, placed
from dsv3_jax.inference.requests import Answer, Request, Text
from dsv3_jax.inference.sampling import RowSampling
from dsv3_jax.inference.scheduler import Scheduler
from dsv3_jax.inference.settings import EngineConfig, bucket, buckets
from dsv3_jax.inference.speculative import Verdict
from dsv3_jax.inference.step import MOST_STEPS, Chunk, Lease
from dsv3_jax.inference.weights import Weights

# One call makes as many steps as it can in this time: a new request should not wait for longer.
PATIENCE = 0.05
SHORTEST_CHUNK, NARROWEST = 16, 4  # the least buckets of a chunk's tokens and a table's pages


class Engine:
    """Texts of many requests over one model's weights. For one thread."""

    def __init__(
        self, weights: Weights, settings: EngineConfig | None = None, mesh: Mesh | None = None
    ) -> None:
        """ValueError for settings that the model does not allow."""
        self.settings = settings = settings or EngineConfig()
        cfg = weights.rest.cfg
        settings.check_model(cfg)
        self.weights = placed(weights, mesh)
        self.longest = cfg.max_length
        self.programs = Programs(make_experts(cfg, settings, mesh), mesh, settings.top_logprobs)
        pages = settings.num_pages(self.longest)
        self.scheduler = Scheduler(settings, self.programs.shards, pages)
        self.state = self.programs.empty_state(weights, settings, pages)
        self._row_buckets = buckets(settings.rows)
        self._chunk_buckets = buckets(settings.chunk, min(SHORTEST_CHUNK, settings.chunk))
        widest = min(pages, -(-self.longest // settings.page_slots))
        self._width_buckets = buckets(widest, min(NARROWEST, widest))
        self._ids, self._steps = ids(), 1
        self._texts: dict[int, Text] = {}

    # --- requests --------------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """The request's id; its text begins as soon as there is room. ValueError, one line, for one
        that cannot be served; the engine goes on.
        """
        request.check(self.weights.rest.cfg.vocab_size, self.longest)
        limit = min(len(request.prompt) + request.max_tokens, self.longest)
        pool = self.scheduler.pages[0]
        if pool.needed(limit) > pool.count:
            raise ValueError(
                f"a text of {limit} tokens, prompt and answer; allowed: at most the "
                f"{pool.count * pool.page_slots} that the cache has room for"
            )
        text = Text(next(self._ids), request, limit, list(request.prompt))
        self._texts[text.id] = text
        self.scheduler.waiting.append(text)
        return text.id

    def cancel(self, request_id: int) -> bool:
        """Whether the request was still there; nothing more will be answered to it."""
        text = self._texts.pop(request_id, None)
        if text is not None:
            self.scheduler.leave(text)
        return text is not None

    @property
    def pending(self) -> int:
        """Requests that have not ended."""
        return len(self._texts)

    def run(self) -> Iterator[Answer]:
        """Turns until every request has ended."""
        while self.pending:
            yield from self.turn()

    def turn(self) -> list[Answer]:
        """Goes on for a moment. New tokens of each request that has some."""
        self.scheduler.admit()
        readers = self.scheduler.readers()
        answers = self._read(readers) if any(readers) else []
        return answers + self._go_on()

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
        chunks = [self._chunk(turn, counts, size) for turn in turns]
        leases = [self._lease(turn, width) for turn in turns]
        self.state, verdicts = self.programs.read(self.weights, self.state, chunks, leases, fresh)
        verdicts = jax.tree.map(np.asarray, verdicts)
        answers = []
        for turn, verdict in zip(turns, verdicts, strict=True):
            for place, text in enumerate(turn):
                if text is not None:
                    self._has_read(text, counts[text.id])
                    if not text.unread and not text.answered:
                        answers.append(self._answer(text, 1, verdict, place))
        return answers

    def _has_read(self, text: Text, count: int) -> None:
        text.read, text.began = text.read + count, True
        self.scheduler.tell(text)

    def _chunk(self, turn: Sequence[Text | None], counts: dict[int, int], size: int) -> Chunk:
        ahead = size + len(self.weights.depths) + 1
        chunk = Chunk(
            *(np.zeros(len(turn), kind) for kind in (np.int32, bool)),
            np.zeros((len(turn), ahead), np.int32),
            *(np.zeros(len(turn), np.int32) for _ in range(3)),
        )
        for i, text in enumerate(turn):
            if text is None:
                continue
            known = text.tokens[text.read :][: counts[text.id] + ahead - size]
            chunk.token_Bt[i, : len(known)] = known
            chunk.row_B[i], chunk.first_B[i] = text.row, not text.began
            chunk.start_B[i], chunk.count_B[i] = text.read, counts[text.id]
            chunk.known_B[i] = len(known)
        return chunk

    # --- steps -----------------------------------------------------------------------------------

    def _go_on(self) -> list[Answer]:
        steps = self._steps if not self._somebody_waits() else 1
        steps = min(
            steps, max((t.limit - len(t.tokens) for t in self.scheduler.goers()), default=0)
        )
        texts = self.scheduler.make_room(steps * (len(self.weights.depths) + 1))
        if not texts:
            return []
        rows = bucket(1 + max(text.row for text in texts), self._row_buckets)
        grid: list[Text | None] = [None] * (self.programs.shards * rows)
        for text in texts:
            grid[text.shard * rows + text.row] = text
        width = self._width(max(len(text.pages) for text in texts) * self.settings.page_slots)
        active_B = np.array([text is not None for text in grid])
        begun, compiled = time.perf_counter(), self.programs.compiled
        self.state, verdict = self.programs.go_on(
            self.weights, self.state, self._lease(grid, width), active_B, steps
        )
        verdict = jax.tree.map(np.asarray, verdict)
        if self.programs.compiled == compiled:
            fitting = steps * PATIENCE / (time.perf_counter() - begun)
            self._steps = min(max(int(fitting), 1), MOST_STEPS)
        return [
            self._answer(text, steps, verdict, place)
            for place, text in enumerate(grid)
            if text is not None
        ]

    def _somebody_waits(self) -> bool:
        return bool(self.scheduler.waiting) or any(self.scheduler.readers())

    # --- both ------------------------------------------------------------------------------------

    def _width(self, slots: int) -> int:
        """Pages of a table that has so many slots."""
        return bucket(self.scheduler.pages[0].needed(slots), self._width_buckets)

    def _lease(self, texts: Sequence[Text | None], width: int) -> Lease:
        def numbers(of: Callable[[Text], Any], kind: Any) -> np.ndarray:
            return np.array([0 if text is None else of(text) for text in texts], kind)

        how = RowSampling(
            numbers(lambda text: text.request.seed, np.uint32),
            numbers(lambda text: text.request.temperature, np.float32),
            numbers(lambda text: text.request.top_p, np.float32),
        )
        table_BY = np.zeros((len(texts), width), np.int32)
        for pages, text in zip(table_BY, texts, strict=True):
            if text is not None:
                known = text.pages[:width]
                pages[: len(known)] = known
        own_from_B = numbers(lambda text: text.borrowed * self.settings.page_slots, np.int32)
        return Lease(table_BY, own_from_B, numbers(lambda text: text.limit, np.int32), how)

    def _answer(self, text: Text, steps: int, verdict: Verdict, place: int) -> Answer:
        """What a text takes of its row's verdicts; it leaves when it has ended."""
        answer = Answer(text.id)
        by_step = (
            [verdict]
            if verdict.token_BJ.ndim == 2
            else [jax.tree.map(lambda x, i=i: x[i], verdict) for i in range(steps)]
        )
        for one in by_step:
            taken = int(one.taken_B[place])
            count, answer.ended = text.take(one.token_BJ[place, :taken].tolist())
            answer.tokens += one.token_BJ[place, :count].tolist()
            answer.logprobs += one.logprob_BJ[place, :count].tolist()
            answer.top += [
                list(zip(ids.tolist(), logprobs.tolist(), strict=True))
                for ids, logprobs in zip(
                    one.top_BJn[place, :count], one.top_logprob_BJn[place, :count], strict=True
                )
            ]
            if answer.ended:
                break
        text.read = len(text.tokens) - 1
        if answer.ended:
            del self._texts[text.id]
            self.scheduler.leave(text)
        return answer
