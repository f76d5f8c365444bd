"""Prometheus is told what has happened; nothing that a client sends becomes a name of its own."""

import math

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from dsv3_jax.server.metrics import Metrics, Pace, see
from tests.server.clients import ask
from tests.server.scripted import ScriptedEngine, saying, service_of
from tests.server.serving import serving


def told(base: str) -> dict[tuple, float]:
    reply = ask(base, "/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(reply.body.decode())
        for sample in family.samples
    }


def test_what_has_happened_is_counted():
    engine = ScriptedEngine(saying("abcd"), rows=3)
    with serving(service_of(engine)) as base:
        before = told(base)
        for _ in range(3):
            ask(base, "/v1/completions", {"prompt": "a", "n": 2})
        for path in ("/v1/completions", "/a", "/b", "/%00"):
            ask(base, path)
        found = told(base)
    assert before[("dsv3_tokens_total",)] == 0
    assert found[("dsv3_tokens_total",)] == 3 * 2 * 5
    assert found[("dsv3_requests_total", "/v1/completions", "200")] == 3
    assert found[("dsv3_requests_total", "/v1/completions", "405")] == 1
    assert found[("dsv3_requests_total", "other", "404")] == 3
    assert found[("dsv3_time_to_first_token_seconds_count",)] == 6
    assert found[("dsv3_time_per_output_token_seconds_count",)] == 6
    assert found[("dsv3_request_seconds_count",)] == 3
    assert found[("dsv3_rows",)] == 3
    assert 0 < found[("dsv3_tokens_per_second",)] <= 3
    assert found[("dsv3_drafts_offered_total", "1")] == 0
    assert found[("dsv3_expert_imbalance",)] == 1.5


def test_what_an_engine_has_is_seen_of_it():
    engine = ScriptedEngine()
    pages = engine.scheduler.pages[0]
    pages.lend(2)
    engine.scheduler.running, engine.scheduler.waiting = [1, 2], [3]
    engine.statistics.offered, engine.statistics.accepted = [5, 3], [4, 1]
    seen = see(engine)
    assert seen.cache_use == 2 / 8
    assert (seen.running, seen.waiting) == (2, 1)
    text = Metrics().text(seen).decode()
    assert 'dsv3_drafts_accepted_total{module="2"} 1.0' in text


def test_the_pace_is_that_of_the_last_moments():
    now = [0.0]
    pace = Pace(lambda: now[0])
    assert pace.per_second() == 0
    for now[0] in (1.0, 2.0, 9.0):
        pace.note(30)
    assert pace.per_second() == 9
    now[0] = 11.5
    assert pace.per_second() == 6
    now[0] = 100.0
    assert pace.per_second() == 0


def test_before_any_token_no_expert_is_busier():
    engine = ScriptedEngine()
    engine.total_loads = lambda: np.zeros((2, 4), np.int64)
    assert math.isnan(see(engine).imbalance)
