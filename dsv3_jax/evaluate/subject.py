"""A model that is evaluated: it scores given answers, and writes its own.

Contexts begin with a begin-of-sentence token, as all texts of training do. What is longer than the
model loses its beginning, and is counted.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.evaluate.rolling import TextScore, windows
from dsv3_jax.evaluate.scoring import Row, Scored, Scorer
from dsv3_jax.inference.answers import Written, texts_of
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.opening import Opened
from dsv3_jax.inference.options import EngineOptions, own_names
from dsv3_jax.inference.progress import progress
from dsv3_jax.inference.prompt_file import Prompt, Wishes
from dsv3_jax.inference.requests import Request
from dsv3_jax.inference.settings import EngineConfig


@dataclass(frozen=True)
class Pair:
    """Tokens that are given, and those whose probability after them is asked for."""

    context: Sequence[int]
    continuation: Sequence[int]


class Subject:
    """An opened model, with all that was counted of what it was asked."""

    def __init__(self, opened: Opened, engine: EngineOptions | None = None, rows: int = 16) -> None:
        """`rows` of a batch that is scored, on each device."""
        weights, self.mesh, self.folder = opened
        self.scorer = Scorer(weights, self.mesh, rows)
        self.options = engine or EngineOptions()
        self.counts = Counter(scored=0, written=0, cut=0, shortened=0)
        """Rows scored and texts written; of both, those whose beginning was cut; and texts that the
        model's length ended before their own limit"""
        self._engine: Engine | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        return self.folder.tokenizer

    @property
    def bos_id(self) -> int:
        return self.folder.cfg.bos_id

    @property
    def longest(self) -> int:
        """Most tokens that the model reads."""
        return self.folder.cfg.max_length

    def encode(self, text: str) -> list[int]:
        """Ids of a text, none before it."""
        return self.tokenizer.encode(text).tolist()

    # --- scoring ---------------------------------------------------------------------------------

    def likelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Of every continuation log p in nats, and whether it is what the model would write.

        ValueError for an empty context, and for a continuation that is longer than the model.
        """
        rows = [self._row_of(pair) for pair in pairs]
        found = self._score(rows)
        return [(float(scored.logprob_N.sum()), scored.likeliest) for scored in found]

    def rolling(self, texts: Sequence[str], stride: int | None = None) -> list[TextScore]:
        """Of every text all of its tokens, the first after a begin-of-sentence token, in the
        windows of `rolling`; the default stride is as long as the model, as lm-eval has it.
        """
        rows, counts, sizes = [], [], []
        for text in texts:
            ids = [self.bos_id, *self.encode(text)]
            before = len(rows)
            for window in windows(len(ids) - 1, self.longest, stride or self.longest):
                labels = ids[window.begin + 1 : window.end + 1]
                unasked = len(labels) - window.scored
                rows.append(Row(ids[window.begin : window.end], [-1] * unasked + labels[unasked:]))
            counts.append(len(rows) - before)
            sizes.append((len(ids) - 1, len(text.encode())))
        found = iter(self._score(rows))
        scores = []
        for count, (tokens, size) in zip(counts, sizes, strict=True):
            nats = -sum(float(next(found).logprob_N.sum()) for _ in range(count))
            scores.append(TextScore(nats, tokens, size))
        return scores

    def _row_of(self, pair: Pair) -> Row:
        asked = len(pair.continuation)
        if not pair.context or asked > self.longest:
            raise ValueError(
                f"{asked} tokens are to be scored after {len(pair.context)}; allowed: at most "
                f"model.max_length = {self.longest}, after 1 or more"
            )
        ids = [*pair.context, *pair.continuation]
        if len(ids) > self.longest + 1:
            self.counts["cut"] += 1
            ids = ids[-self.longest - 1 :]
        labels = [-1] * (len(ids) - 1 - asked) + ids[len(ids) - asked :]
        return Row(ids[:-1], labels)

    def _score(self, rows: Sequence[Row]) -> list[Scored]:
        self.counts["scored"] += len(rows)
        with progress(len(rows), lambda: "scored", shown=sys.stderr.isatty()) as told:
            return self.scorer.score(rows, told)

    # --- writing ---------------------------------------------------------------------------------

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        wishes: Sequence[Wishes],
        ends: frozenset[int] = frozenset(),
    ) -> list[str]:
        """The texts behind these prompts, up to what ends a text of the model's or one of `ends`. A
        prompt leaves the answer the room that it wishes, but at most half of the model's length,
        and loses its beginning for that.

        ValueError for a prompt without a token, and for wishes that cannot be.
        """
        asks = [
            (Prompt("given as ids", wish, {}), self._request(prompt, wish, ends))
            for prompt, wish in zip(prompts, wishes, strict=True)
        ]
        engine, texts = self._engine_for([request for _, request in asks]), []

        def said() -> str:
            return f"{engine.statistics.written:,} tokens written"

        with progress(len(asks), said, shown=sys.stderr.isatty()) as told:
            for written in texts_of(engine, asks, self.tokenizer.token_bytes, told):
                if isinstance(written, ValueError):
                    raise written
                texts.append(self._counted(written))
        return texts

    def _request(self, prompt: Sequence[int], wish: Wishes, ends: frozenset[int]) -> Request:
        wish.check()
        room = self.longest - min(wish.max_tokens, self.longest // 2)
        if len(prompt) > room:
            self.counts["cut"] += 1
            prompt = prompt[-room:]
        ends |= self.folder.end_ids
        return Request(prompt, wish.max_tokens, wish.temperature, wish.top_p, wish.seed, ends)

    def _counted(self, written: Written) -> str:
        self.counts["written"] += 1
        self.counts["shortened"] += written.ended == "max_length"
        return written.text

    def _engine_for(self, requests: Sequence[Request]) -> Engine:
        """The one that there is, if it has room."""
        lengths = [min(len(one.prompt) + one.max_tokens, self.longest) for one in requests]
        settings = self.options.settings(lengths)
        if self._engine is None or not self._has_room(self._engine.settings, settings):
            self._engine = None  # its cache goes before another is made
            with own_names():
                self._engine = Engine(self.scorer.weights, settings, self.mesh)
        return self._engine

    def _has_room(self, there: EngineConfig, wished: EngineConfig) -> bool:
        alike = replace(wished, pages=there.pages) == there
        return alike and wished.num_pages(self.longest) <= there.num_pages(self.longest)
