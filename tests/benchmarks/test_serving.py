"""Contests of serving without measuring: the requests, static batches, who competes; in small."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dsv3_jax.config.presets import bench_cpu, tiny_run
from dsv3_jax.data.tokenizer import train_tokenizer
from tests.inference.engines import MODEL
from tests.runs import jax_option
from tests.shapes import random_model

ROOT = Path(__file__).parents[2]
WORK = {
    "requests": 40,
    "rate": 0.0,
    "prompt": (3, 9),
    "tokens": (2, 6),
    "vocab_size": 50,
    "text": (),
}


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a script that lies in that folder, and for a contender."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "contenders")


def test_requests_are_of_all_lengths_and_the_same_for_everyone():
    from arrivals import arrivals

    found = arrivals(WORK)
    assert found == arrivals(json.loads(json.dumps(WORK)))
    assert {len(one.prompt) for one in found} == set(range(3, 10))
    assert {one.tokens for one in found} == set(range(2, 7))
    assert {one.at for one in found} == {0.0}
    assert all(0 <= token < 50 for one in found for token in one.prompt)


def test_requests_come_at_the_rate_with_pieces_of_the_text():
    from arrivals import arrivals

    found = arrivals(WORK | {"requests": 1000, "rate": 4.0, "text": list(range(100, 200))})
    times = [one.at for one in found]
    assert times == sorted(times)
    # 999 gaps of a quarter of a second on average; a sigma of their sum is 8 s.
    assert abs(times[-1] - 250) < 40
    for one in found:
        first = one.prompt[0]
        assert one.prompt == list(range(first, first + len(one.prompt)))


def test_a_static_batch_takes_who_waits_and_ends_before_the_next(monkeypatch: pytest.MonkeyPatch):
    import arrivals

    clock = [100.0]
    monkeypatch.setattr(arrivals.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(arrivals.time, "sleep", lambda s: clock.__setitem__(0, clock[0] + s))
    found = [arrivals.Arrival([1], 1, at) for at in (0.0, 0.5, 0.5, 0.5, 9.0)]
    batches = []

    def serve(batch):
        batches.append([one.at for one in batch])
        clock[0] += 2

    wait = arrivals.served_in_batches(found, 2, serve)
    assert batches == [[0.0], [0.5, 0.5], [0.5], [9.0]]
    # They end at 2, 4, 4, 6 and 11.
    assert wait == pytest.approx((2 + 3.5 + 3.5 + 5.5 + 2) / 5)


def test_engines_meet_static_batches_with_the_same_requests():
    from contenders.serving import BATCHES, batching, engines, generating, served_model
    from decode_cpu import Options

    options = Options(torch_python="torch", python=("another",), drafts=2)
    served = served_model(options)
    assert served.model == replace(bench_cpu(), mtp_depth=2)
    ours, own_rival = engines(options, served, 2.0), batching(options, served, 2.0)
    rivals = generating(options, served, 2.0)
    assert [(c.options["drafts"], c.python) for c in ours] == [
        (0, sys.executable),
        (0, "another"),
        (2, sys.executable),
        (2, "another"),
    ]
    everyone = [*ours, *own_rival, *rivals]
    assert {c.group for c in everyone} == {"32 requests, 2 a second"}
    assert len({c.tokens for c in everyone}) == 1
    same = ("requests", "rate", "prompt", "tokens", "vocab_size", "text", "rows")
    assert len({json.dumps([c.options[name] for name in same]) for c in everyone}) == 1
    assert all(c.name.startswith(BATCHES) for c in own_rival)
    assert len(rivals) == 4  # of 8 * 256 tokens batched_mm gathers 3.2 GB


def test_a_run_serves_pieces_of_this_projects_source(tmp_path: Path):
    from contenders.serving import served_model
    from decode_cpu import Options

    (tmp_path / "config.json").write_text(tiny_run().to_json())
    train_tokenizer(["def f(self):\n    return self\n"] * 40, 300).save(tmp_path / "tokenizer.json")
    served = served_model(Options(run=tmp_path))
    assert served.model == tiny_run().model
    assert len(served.text) == 10_000
    assert len(json.dumps(served.text)) < 128_000
    with pytest.raises(ValueError, match="--drafts is 2; allowed: at most 1"):
        served_model(Options(run=tmp_path, drafts=2))
    with pytest.raises(ValueError, match="is no run"):
        served_model(Options(run=tmp_path / "gone"))
    with pytest.raises(ValueError, match="text is 1280; allowed: at most 1024 tokens"):
        served_model(Options(run=tmp_path, request_tokens=(1, 1024)))


def test_seconds_of_a_request_are_a_column_where_requests_are_served():
    from contenders.side_by_side import Contender
    from contenders.table import table

    def contender(name: str, waits: list[float]) -> Contender:
        made = Contender(name, "g", "", "", {}, 100, seconds=[1.0], waits=waits)
        made.facts = {"versions": "1.0"}
        return made

    head, _, first, second = table([contender("a", [0.5, 1.5, 0.25]), contender("b", [])], ())
    assert head.split("|")[-2].strip() == "seconds a request"
    assert [line.split("|")[-2].strip() for line in (first, second)] == ["0.50", "-"]
    assert "seconds a request" not in table([contender("b", [])], ())[0]


@pytest.mark.slow
def test_the_engine_serves_them_all_and_compiles_nothing_meanwhile(monkeypatch):
    import serve_dsv3

    model = replace(MODEL, mtp_depth=1, max_length=128)
    monkeypatch.setattr(serve_dsv3, "model_of", lambda options: random_model(model))
    sizes = {"rows": 2, "prompt": (1, 16), "tokens": (1, 20), "requests": 6, "rate": 20.0}
    options = WORK | sizes | {"drafts": 1}
    with jax_option("jax_disable_most_optimizations"):
        work = serve_dsv3.by_engine(options, serve_dsv3.arrivals(options))
        assert work()["wait"] > 0


@pytest.mark.slow
def test_static_batches_of_continued_serve_them_all(monkeypatch):
    import serve_dsv3

    monkeypatch.setattr(serve_dsv3, "model_of", lambda options: random_model(MODEL))
    made, own = [], serve_dsv3.continued

    def noted(weights, prompt_BT, tokens, *more):
        made.append((prompt_BT, tokens))
        return own(weights, prompt_BT, tokens, *more)

    monkeypatch.setattr(serve_dsv3, "continued", noted)
    options = WORK | {"requests": 5, "rows": 2}
    found = serve_dsv3.arrivals(options)
    with jax_option("jax_disable_most_optimizations"):
        assert serve_dsv3.in_batches(options, found)()["wait"] > 0
    assert [tokens for _, tokens in made] == [
        max(one.tokens for one in found[i : i + 2]) for i in (0, 2, 4)
    ]
    assert {prompt_BT.shape for prompt_BT, _ in made} == {(2, 9)}
    first = made[0][0][0]
    assert first[9 - len(found[0].prompt) :].tolist() == found[0].prompt
    assert not first[: 9 - len(found[0].prompt)].any()
