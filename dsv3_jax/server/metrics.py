"""What Prometheus is told: counts and times of requests as they end, and the engine's own state."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from dsv3_jax.inference.engine import Engine

PACE_SECONDS = 10
# Bounds of the histograms' buckets.
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Seen(NamedTuple):
    """An engine between two turns."""

    counts: dict[str, float]
    offered: list[int]
    accepted: list[int]
    running: int
    waiting: int
    rows: int
    cache_use: float
    imbalance: float


def see(engine: Engine) -> Seen:
    """For the engine's thread."""
    told, scheduler = engine.statistics, engine.scheduler
    free = sum(pool.free for pool in scheduler.pages)
    count = sum(pool.count for pool in scheduler.pages)
    return Seen(
        {
            "prompt_tokens": told.read,
            "prompt_tokens_shared": told.borrowed,
            "tokens": told.written,
            "prompt_seconds": told.reading,
            "decode_seconds": told.going_on,
            "texts": told.requests,
            "preemptions": told.gave_up,
        },
        list(told.offered),
        list(told.accepted),
        len(scheduler.running),
        len(scheduler.waiting),
        engine.rows,
        1 - free / count,
        _imbalance(engine.total_loads()),
    )


def _imbalance(load_LE: np.ndarray) -> float:
    """Tokens of the busiest expert over the mean, in the worst layer; NaN before there are any."""
    used_LE = load_LE[load_LE.sum(-1) > 0]
    return float((used_LE.max(-1) / used_LE.mean(-1)).max()) if len(used_LE) else math.nan


_COUNTS = {
    "prompt_tokens": "Tokens of prompts that were read",
    "prompt_tokens_shared": "Tokens of prompts that another text had read",
    "tokens": "Tokens that were written",
    "prompt_seconds": "Seconds in which prompts were read",
    "decode_seconds": "Seconds in which texts went on",
    "texts": "Texts that have ended or were cancelled",
    "preemptions": "Times that a text gave up its pages",
}


class Pace:
    """Tokens a second of the last moments."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._noted: deque[tuple[float, int]] = deque()

    def note(self, tokens: int) -> None:
        """They came now."""
        self._noted.append((self._clock(), tokens))
        self._forget()

    def per_second(self) -> float:
        """Over the last `PACE_SECONDS`."""
        self._forget()
        return sum(tokens for _, tokens in self._noted) / PACE_SECONDS

    def _forget(self) -> None:
        while self._noted and self._noted[0][0] < self._clock() - PACE_SECONDS:
            self._noted.popleft()


class Metrics:
    """A server's own registry."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._seen: Seen | None = None
        self.pace = Pace()
        self._registry.register(self)
        self.requests = Counter(
            "dsv3_requests", "HTTP requests", ("path", "status"), registry=self._registry
        )
        self.first_token = self._histogram("dsv3_time_to_first_token_seconds", _SECONDS)
        self.per_token = self._histogram("dsv3_time_per_output_token_seconds", _TOKEN_SECONDS)
        self.whole = self._histogram("dsv3_request_seconds", _SECONDS)

    def _histogram(self, name: str, buckets: tuple[float, ...]) -> Histogram:
        said = name.removeprefix("dsv3_").removesuffix("_seconds").replace("_", " ")
        return Histogram(name, f"Seconds: {said}", buckets=buckets, registry=self._registry)

    def text(self, seen: Seen) -> bytes:
        """In Prometheus' text format."""
        self._seen = seen
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """As a collector of the registry: the engine's part."""
        seen = self._seen
        if seen is None:
            return
        for name, value in seen.counts.items():
            yield CounterMetricFamily(f"dsv3_{name}", _COUNTS[name], value=value)
        for name, said, values in (
            ("drafts_offered", "Drafts that were looked at", seen.offered),
            ("drafts_accepted", "Drafts that stayed", seen.accepted),
        ):
            family = CounterMetricFamily(f"dsv3_{name}", said, labels=("module",))
            for module, value in enumerate(values, start=1):
                family.add_metric((str(module),), value)
            yield family
        for name, said, value in (
            (
                "tokens_per_second",
                f"Tokens that clients got in the last {PACE_SECONDS} s, over these",
                self.pace.per_second(),
            ),
            ("texts_running", "Texts that have a row: the batch", seen.running),
            ("texts_waiting", "Texts in the queue", seen.waiting),
            ("rows", "Texts that can run at the same time", seen.rows),
            ("cache_use", "Share of the cache's pages that texts hold", seen.cache_use),
            (
                "expert_imbalance",
                "Tokens of the busiest expert over the mean, in the worst layer, since the start",
                seen.imbalance,
            ),
        ):
            yield GaugeMetricFamily(f"dsv3_{name}", said, value=value)
