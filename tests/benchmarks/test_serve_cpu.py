"""Servers under load without measuring: the table, who competes, the folder that is served."""

import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.config.presets import bench_cpu, tiny_run
from dsv3_jax.data.tokenizer import train_tokenizer
from tests.runs import jax_option
from tests.shapes import tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a script that lies in that folder, and for a contender."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "contenders")


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101, 320])
def test_percentiles_are_numpys(count: int):
    from outcomes import percentile

    values = np.random.default_rng(count).exponential(size=count).tolist()
    for share in (0.0, 0.25, 0.5, 0.9, 0.99, 1.0):
        expected = np.percentile(values, 100 * share)
        assert percentile(values, share) == pytest.approx(expected, rel=1e-12)


def contender(name: str, *loads: list, **fields):
    """One load a turn; each with outcomes."""
    from contenders.side_by_side import Contender

    made = Contender(name, "serving", "", "", {}, 0, peak_bytes=2_000_000, **fields)
    made.facts = {"versions": "1.0"}
    made.seconds = [2.0] * len(loads)
    made.loads = [
        [{"seconds": 2.0, "server_cpu": 3.0, "client_cpu": 0.02, "outcomes": found}]
        for found in loads
    ]
    return made


def test_the_table_has_ends_of_all_rounds_and_medians_of_rates():
    from contenders.load_table import load_table

    ok = 200
    first = [[0.0, 0.1, 1.1, 11, 5, ok], [0.001, 0.2, 0.2, 1, 7, ok], [0.0, 0, 0, 0, 0, 429]]
    second = [[0.0, 0.3, 2.3, 21, 6, ok], [0.0, 0, 0, 0, 0, 0], [0.0, 0, 0, 0, 0, 500]]
    ours = contender("ours", first, second)
    theirs = contender(
        "torch serve", [[0.0, 1, 1.3, 2, 5, ok]], [[0.0, 1, 4.6, 2, 5, ok]], is_baseline=True
    )
    head, _, row, other, _, *notes = load_table([ours, theirs], [{"rate": 0.5}])
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "0.5 a second: ours",
        "1.0",
        "8",  # of 12 tokens in 2 s, and 21 in 2 s
        "0.75",
        "200, 280, 298 (200)",
        "100.0, 100.0, 100.0 (100.0)",  # a text of one token has no gap
        "1.10, 2.06, 2.28 (1.20)",
        "1, 2",
        "2",
        "1.50, 1.0%",
        "2.00",  # a median of 0.65 beside 1.3, and 2.3 beside 4.6
    ]
    assert "0.5 a second: torch serve (baseline)" in other
    assert "× torch, of rounds" in head
    assert notes[0] == (
        "ours, 1.0: 6 requests, 11.0 tokens after prompts of 6.0 on average, sent at most 1.0 ms "
        "late"
    )
    alone = load_table([ours], [{"clients": 8}])
    assert "×" not in alone[0]
    assert "8 clients: ours" in alone[2]


def test_a_load_that_nobody_was_served_under_has_a_row():
    from contenders.load_table import load_table, times_sooner

    refused = contender("ours", [[0.0, 0, 0, 0, 0, 429]] * 3)
    busy = contender("torch", [[0.0, 1, 2, 2, 5, 200]], [[0.0, 1, 2, 2, 5, 200]])
    rows = load_table([refused, busy], [{"clients": 1}])
    cells = [cell.strip() for cell in rows[2].strip("|").split("|")]
    assert cells[2:8] == ["0", "0.00", "-", "-", "-", "3, 0"]
    assert "1 client: ours" in cells[0]
    assert times_sooner(refused, busy, 0) is None
    assert rows[-2].endswith("ended after 1 of 2 rounds")


def test_figures_keep_every_request(tmp_path: Path):
    from contenders.table import write_figures

    ours = contender("ours", [[0.0, 0.1, 1.1, 11, 5, 200]])
    write_figures(tmp_path / "x.json", [ours], ["a line"], interpreters=[])
    (kept,) = json.loads((tmp_path / "x.json").read_text())["contenders"]
    assert kept["loads"] == ours.loads
    assert "tokens_per_second" not in kept


# --- who competes, with what ---


def test_servers_are_ours_by_interpreter_and_transformers_by_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import serve_cpu

    options = serve_cpu.Options(torch_python="torch", python=("another",), allocator="default")
    work = serve_cpu.Work(bench_cpu(), tmp_path / "model", tmp_path / "text.json")
    work.folder.mkdir()
    (work.folder / "config.json").write_text('{"a": 1}')
    (work.folder / "model.safetensors").write_text("weights")
    ours = serve_cpu.ours(options, work)
    assert [one.options["command"][0] for one in ours] == [sys.executable, "another"]
    monkeypatch.setattr(serve_cpu, "can_serve", lambda python: True)
    servers = serve_cpu.rivals(options, work)
    assert len({one.name for one in servers}) == len(servers) == 6
    folders = {Path(one.options["command"][4]) for one in servers}
    forms = {json.loads((f / "config.json").read_text())["experts_implementation"] for f in folders}
    assert forms == {"eager", "grouped_mm", "batched_mm"}
    assert {(folder / "model.safetensors").read_text() for folder in folders} == {"weights"}
    monkeypatch.setattr(serve_cpu, "can_serve", lambda python: False)
    loops = serve_cpu.rivals(options, work)
    assert {one.script for one in loops} == {"serve_singly.py"}
    same = ("requests", "prompt", "tokens", "seed", "text", "loads", "rows", "warm_up")
    everyone = [*ours, *servers, *loops]
    assert len({json.dumps([one.options[name] for name in same]) for one in everyone}) == 1
    assert {one.environment["DSV3_ALLOCATOR"] for one in everyone} == {"default"}
    assert not any("MALLOC_ARENA_MAX" in one.environment for one in everyone)


def test_the_fastest_variant_goes_on_and_all_are_told(monkeypatch: pytest.MonkeyPatch):
    import serve_cpu

    def variant(name: str, seconds: list[float]):
        made = contender(name)
        made.options = {"loads": ["all"], "requests": 32, "seconds": seconds}
        return made

    def turns(running, rounds):
        for one in running:
            assert (one.options["loads"], one.options["requests"]) == ([{"clients": 1}], 4)
            one.seconds += one.options["seconds"]
            one.loads.append("a short turn")
        return [one for one in running if one.seconds]

    variants = [variant("a", [3.0, 9.0]), variant("b", [4.0, 5.0]), variant("c", [])]
    monkeypatch.setattr(serve_cpu, "rivals", lambda options, work: variants)
    monkeypatch.setattr(serve_cpu, "started", contextlib.nullcontext)
    monkeypatch.setattr(serve_cpu, "take_turns", turns)
    best, lines = serve_cpu.fastest(serve_cpu.Options(), None)
    assert best == [variants[1]]
    assert best[0].is_baseline
    assert best[0].options["requests"] == 32
    assert not best[0].seconds + best[0].loads
    assert lines[1:] == ["a: 6.0 s for 4 requests", "b: 4.5 s for 4 requests"]
    monkeypatch.setattr(serve_cpu, "rivals", lambda options, work: variants[2:])
    assert serve_cpu.fastest(serve_cpu.Options(), None) == ([], [])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rates": (0.0,)}, "--rates is .0.0,.; allowed: above 0"),
        ({"clients": (0,)}, "--clients is .0,.; allowed: at least 1"),
        ({"requests": 0}, "--requests is 0; allowed: at least 1"),
        ({"rates": (), "clients": ()}, "allowed: one of them at least"),
        ({"rounds": 0}, "--rounds is 0"),
    ],
)
def test_options_that_are_no_load_are_refused(changes: dict, said: str):
    from serve_cpu import Options

    with pytest.raises(ValueError, match=said):
        Options(**changes)


def test_a_run_or_the_fixed_shape_is_served(tmp_path: Path):
    from serve_cpu import Options

    assert Options().served(bench_cpu()) == bench_cpu()
    (tmp_path / "config.json").write_text(tiny_run().to_json())
    assert Options(run=tmp_path).served(bench_cpu()) == tiny_run().model
    with pytest.raises(ValueError, match="text is 4112; allowed: at most 4096 tokens"):
        Options(request_tokens=(1, 3856)).served(bench_cpu())


# --- the folder ---


def test_random_weights_write_whole_characters_alone_and_no_end():
    from served_folder import silenced

    tokenizer = train_tokenizer(["der Bär sagt: naïve Grüße\n"] * 9, 300)
    size = tokenizer.vocab_size + 20  # more ids than tokens
    before_DV = np.random.default_rng(0).standard_normal((3, size))
    after_DV = silenced(before_DV, tokenizer)
    silent = set(np.flatnonzero((after_DV == 0).all(0)).tolist())
    spoken = sorted({*range(size)} - silent)
    assert np.array_equal(after_DV[:, spoken], before_DV[:, spoken])
    assert {tokenizer.eos_id, tokenizer.bos_id, *range(size - 20, size)} <= silent
    assert {*"der Bär".split()} <= {tokenizer.decode([i]).strip() for i in spoken}
    assert all(tokenizer.token_bytes[i].decode() for i in spoken)
    for i in silent & {*range(tokenizer.vocab_size)}:
        assert not tokenizer.token_bytes[i] or "\ufffd" in tokenizer.decode([i])


def test_text_is_told_in_ids_and_in_pieces_that_make_it_up(tmp_path: Path):
    from served_folder import write_text

    tokenizer = train_tokenizer(["def f(self):\n    return self\n"] * 40, 300)
    tokenizer.save(tmp_path / "tokenizer.json")
    write_text(tmp_path, tmp_path / "text.json")
    found = json.loads((tmp_path / "text.json").read_text())
    assert len(found["ids"]) == len(found["pieces"]) > 9_000
    assert tokenizer.decode(found["ids"]) == "".join(found["pieces"])
    assert "def " in tokenizer.decode(found["ids"])
    assert not any("\ufffd" in piece for piece in found["pieces"])


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_this_projects_server_is_measured_in_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """With a model and the server itself; `test_server_process.py` has it without them."""
    import serve_cpu

    small = tiny_model(vocab_size=300, mtp_depth=0, max_length=256)
    monkeypatch.setattr(serve_cpu, "bench_cpu", lambda: small)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # of the server
    kept = tmp_path / "figures.json"
    sizes = "--requests 3 --rounds 1 --rates 50 --clients 2 --serving-rows 2"
    lengths = "--request-prompt 2 8 --request-tokens 2 6"
    with jax_option("jax_disable_most_optimizations"):
        serve_cpu.main([*f"{sizes} {lengths} --out {kept}".split()])
    (found,) = json.loads(kept.read_text())["contenders"]
    (turn,) = found["loads"]
    for load in turn:
        assert len(load["outcomes"]) == 3
        for _, first, whole, tokens, prompt, status in load["outcomes"]:
            assert status == 200
            assert 0 < first <= whole < load["seconds"]
            assert 2 <= tokens <= 6
            assert 3 <= prompt <= 9  # and what begins a text is one
    assert "50 a second: dsv3_jax" in capsys.readouterr().out
