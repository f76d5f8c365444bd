"""A search for layouts: an exhaustive twin, what fits, the order, mistakes."""

import itertools
import json
from collections import Counter
from dataclasses import replace
from operator import le
from pathlib import Path

import pytest

from dsv3_jax.config import DataConfig, MeshConfig, PipelineConfig, RunConfig, TrainConfig
from dsv3_jax.parallel.orders import Schedule
from dsv3_jax.parallel.schedules import NAMES, make
from dsv3_jax.plan import hardware
from dsv3_jax.plan.__main__ import main
from dsv3_jax.plan.cuts import check_pipeline
from dsv3_jax.plan.hardware import H800
from dsv3_jax.plan.kernel_rates import Figure
from dsv3_jax.plan.memory import memory_of
from dsv3_jax.plan.moments import counts, fullest_moments, moments_of
from dsv3_jax.plan.parameters import Parameters, traced
from dsv3_jax.plan.prediction import predict
from dsv3_jax.plan.search import REMATS, SCHEDULES, Ask, search
from dsv3_jax.plan.search_tables import search_json, search_lines
from tests.commands import mistake_of
from tests.shapes import tiny_model

CONFIGS = Path(__file__).parents[2] / "configs"
DUAL = ["--config", str(CONFIGS / "tiny_dualpipe.py")]
DEVICES = 8


@pytest.fixture(scope="module")
def cfg() -> RunConfig:
    model = tiny_model(num_experts=8, num_layers=6)
    return RunConfig(model, DataConfig(length=64), TrainConfig(rows=32))


@pytest.fixture(scope="module")
def every(cfg: RunConfig) -> list:
    """The slow twin: plans and step times of all layouts, one by one."""
    found, known = [], traced(cfg.model)
    for sizes in itertools.product((1, 2, 4, 8), repeat=4):
        mesh = MeshConfig(*sizes)
        if mesh.size != DEVICES:
            continue
        for schedule, remat in itertools.product(SCHEDULES, REMATS):
            if mesh.pipe == 1 and schedule != "1f1b":
                continue
            count = cfg.train.rows // mesh.token_shards
            try:
                train = replace(cfg.train, microbatches=count, remat=remat)
                one = replace(cfg, mesh=mesh, train=train, pipeline=PipelineConfig(schedule))
                check_pipeline(one)
                found.append(
                    (predict(one, H800).step.seconds, memory_of(one, Parameters(one, known)))
                )
            except ValueError:
                continue
    return found


def with_room(size: float) -> Ask:
    return Ask(replace(H800, memory=Figure(size, "a test")), DEVICES, top=5)


def layout(cfg: RunConfig) -> tuple:
    return cfg.mesh, cfg.pipeline.schedule


def best_of(every: list, room: float) -> list[float]:
    """Step times, fastest first: of each layout the fastest remat that fits."""
    fastest: dict[tuple, float] = {}
    for seconds, plan in every:
        if plan.most <= room:
            key = layout(plan.cfg)
            fastest[key] = min(seconds, fastest.get(key, seconds))
    return sorted(fastest.values())


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_the_fastest_are_those_of_an_exhaustive_search(cfg, every, share: float):
    """With room for as many layouts."""
    sizes = sorted(plan.most for _, plan in every)
    room = sizes[int(share * (len(sizes) - 1))]
    answer = search(cfg, with_room(room))
    expected = best_of(every, room)
    assert [found.seconds for found in answer.fastest] == pytest.approx(expected[:5], rel=1e-12)
    assert answer.fitting == len(expected)
    assert answer.layouts == len({layout(plan.cfg) for _, plan in every})


def test_nothing_is_listed_that_does_not_fit_and_all_is_sorted(cfg, every):
    sizes = sorted(plan.most for _, plan in every)
    room = sizes[len(sizes) // 4]
    answer = search(cfg, with_room(room))
    seconds = [found.seconds for found in answer.fastest]
    assert seconds == sorted(seconds)
    assert len(seconds) == 5
    for found in answer.fastest:
        assert found.memory.most <= room
        assert found.memory == memory_of(found.cfg)
        assert found.cfg.train.rows == cfg.train.rows
        assert found.cfg.mesh.size == DEVICES


def test_where_nothing_fits_the_nearest_is_told(cfg, every):
    least = min(plan.most for _, plan in every)
    answer = search(cfg, with_room(least - 100))
    assert (answer.fastest, answer.fitting, answer.missing) == ((), 0, 100)
    assert answer.nearest.most == least


def test_a_step_takes_no_less_than_its_bound(every):
    for seconds, plan in every:
        assert predict(plan.cfg, H800).stepper.least(plan.cfg.train.rows) <= seconds * (1 + 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_those_of_the_orders(name: str):
    ranks, microbatches = 4, 12
    for rank, known in enumerate(counts(name, ranks, microbatches)):
        operations = make(name, ranks, microbatches).operations(rank)
        assert sum(known.values()) == len(operations)
        for kind in {op.kind for op in operations}:
            counted = sum(number for op, number in known.items() if op.kind == kind)
            assert counted == sum(op.kind == kind for op in operations)


@pytest.mark.parametrize("name", NAMES)
def test_no_moment_holds_more_than_the_fullest(name: str):
    schedule = make(name, 4, 12)
    fullest = fullest_moments(((name, 4, 12), ("1f1b", 4, 3)))
    for rank, kept in enumerate(fullest):
        flat = [sets + left for sets, left in kept]
        assert {sets + left for sets, left in moments_of(schedule, rank)} & set(flat)
        for sets, left in all_moments(schedule, rank):
            assert any(all(map(le, sets + left, more)) for more in flat)


def all_moments(schedule: Schedule, rank: int) -> list[tuple]:
    """After each operation those before their b and those before their W, from orders alone."""
    done: dict[tuple, str] = {}
    found = []
    for op in schedule.operations(rank):
        if op.forward:
            done[op.forward.microbatch, op.forward.chunk] = "b"
        if op.backward:
            work = op.backward.microbatch, op.backward.chunk
            done[work] = "W" if op.kind == "b" else ""
        waiting = Counter((chunk, what) for (_, chunk), what in done.items())
        chunks = range(schedule.chunks)
        found.append(tuple(tuple(waiting[c, what] for c in chunks) for what in "bW"))
    return found


# --- the command ---


def answer_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    main([*DUAL, "--search", *args])
    out = capsys.readouterr()
    assert not out.err  # no terminal, no bar
    return out.out


def test_the_table_and_json_tell_the_same(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    table = answer_of(capsys, "--devices", "8", "--top", "3")
    told = json.loads(answer_of(capsys, "--devices", "8", "--top", "3", "--json"))
    rows = [" ".join(row.split()) for row in table.splitlines()]
    assert len(told["fastest"]) == 3
    for found in told["fastest"]:
        mesh = "×".join(map(str, found["mesh"].values()))
        line = f"{mesh} {found['schedule']} {found['remat']} {found['step_seconds']:.4g} "
        assert any(row.startswith(line) for row in rows)
        left, less = found["left_gigabytes"], found["left_with_workspace_gigabytes"]
        assert any(row.startswith(line) and row.endswith(f" {left:.3g} {less:.3g}") for row in rows)
    assert f"the first one's options: {told['fastest'][0]['options']}" in rows


def test_what_fits_only_without_workspace_is_told(cfg):
    """What stays decides; that the estimate would not fit beside it stands in table and line."""
    everywhere = search(cfg, with_room(80e9)).fastest[0].memory
    rank = everywhere.fullest
    answer = search(cfg, with_room(rank.total + rank.workspace // 2))
    rows = search_json(answer)["fastest"]
    short = sum(row["left_with_workspace_gigabytes"] < 0 for row in rows)
    assert short
    assert all(row["left_gigabytes"] >= 0 for row in rows)
    assert search_lines(answer)[1].endswith(f"; below 0 in {short} of these {len(rows)}")
    assert "below 0" not in search_lines(search(cfg, with_room(80e9)))[1]


def test_a_layouts_options_make_its_plan(capsys):
    """`--config` with them predicts the same step."""
    found = json.loads(answer_of(capsys, "--devices", "8", "--top", "1", "--json"))["fastest"][0]
    main([*DUAL, *found["options"].split(), "--json"])
    lines = json.loads(capsys.readouterr().out)["lines"]
    step = next(line for line in lines if line["label"] == "step")
    assert step["value"] == pytest.approx(found["step_seconds"], rel=1e-9)


def test_a_model_that_fits_nowhere_is_an_answer(capsys, monkeypatch):
    monkeypatch.setattr(hardware, "DEVICES", {"h800": replace(H800, memory=Figure(1e6, "a test"))})
    told = answer_of(capsys, "--devices", "8")
    assert "none of" in told
    assert "in h800's 0.001 GB: the best misses by" in told
    assert "its options: --mesh.pipe" in told


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--devices", "8"], "--devices is 8 without --search; allowed: both, or neither"),
        (["--top", "3"], "--top is 3 without --search"),
        (["--search", "--devices", "0"], "--devices is 0; allowed: 1 to 1,048,576"),
        (["--search", "--devices", "1009"], "--devices is 1,009; allowed: numbers with a mesh"),
        (
            ["--search", "--devices", "8", "--train.rows", "122880000"],
            "with mesh.pipe x train.microbatches up to 100,000",
        ),
        (["--search", "--top", "0"], "--top is 0; allowed: 1 or more"),
        (["--search", "--serve"], "--search and --serve; allowed: one of them"),
        (["--search", "--timeline", "a.png"], "--search and --timeline"),
        (["--search", "--quant.recipe", "f32"], "train.dtype is float32; allowed with --hardware"),
    ],
)
def test_every_mistake_is_one_line(args, line, capsys):
    assert line in mistake_of(main, [*DUAL, *args], capsys)
