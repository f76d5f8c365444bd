"""What a plan says of memory, to people and to programs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dsv3_jax.config.load import load_config
from dsv3_jax.plan.__main__ import main
from dsv3_jax.plan.memory import changes_of, memory_of
from dsv3_jax.plan.memory_tables import memory_json, memory_lines
from tests.commands import mistake_of

CONFIGS = Path(__file__).parents[2] / "configs"
DUAL = ["--config", str(CONFIGS / "tiny_dualpipe.py")]


@pytest.fixture(scope="module")
def plan():
    return memory_of(load_config(CONFIGS / "tiny_dualpipe.py"))


def told(plan, capacity: float = 80e9, skew: float = 1.0) -> str:
    return "\n".join(memory_lines(plan, capacity, skew))


def test_the_fullest_rank_and_its_largest_term_are_named(plan):
    rank = plan.fullest
    assert f"fullest: rank {rank.rank}, {rank.total / 1e9:,.2f} GB" in told(plan)
    assert "GB micro-batches between F and b" in told(plan)
    assert rank.residuals == max(rank.persistent.values())


def test_what_fits_is_told_with_what_is_left(plan):
    assert f"fits: {(80e9 - plan.most) / 1e9:,.2f} GB of 80 GB are left" in told(plan, 80e9)
    assert "--train.remat" not in told(plan, 80e9)


def test_where_workspace_finds_no_room_changes_are_listed(plan):
    rank = plan.fullest
    text = told(plan, rank.total + rank.workspace // 2)
    assert text.count("fits: ") == 1
    assert "with the estimated workspace it exceeds them by" in text
    assert "--train.remat full" in text


def test_what_does_not_fit_is_told_by_how_much_and_what_to_change(plan):
    text = told(plan, plan.most - 20e6)
    assert "does not fit: rank " in text
    assert "by 0.02 GB, workspace left out; its largest term is" in text
    assert "  --train.remat full: " in text


@pytest.mark.parametrize("workspace", [False, True])
def test_changes_are_judged_by_the_measure_of_the_line_above_them(plan, workspace):
    capacity = plan.needs(workspace) - 1
    changes = changes_of(plan, workspace)
    lines = [line for line in told(plan, capacity).splitlines() if line.startswith("  --")]
    assert len(lines) == len(changes)
    for line, change in zip(lines, changes, strict=True):
        assert f" {change.most / 1e9:,.2f} GB{' with workspace' * workspace}, fits" in line
        larger = any(f"--mesh.{axis} " in line for axis in ("data", "local", "pipe"))
        assert ("devices instead of 8" in line) == larger


def test_where_no_change_makes_room_the_search_is_named(plan):
    assert "--search" not in told(plan, plan.most - 1)
    for capacity in (1e3, max(change.most for change in changes_of(plan))):
        text = told(plan, capacity)
        assert text.endswith("--search --devices N finds what fits on N devices") == (
            ", fits" not in text
        )


@pytest.mark.parametrize(("skew", "rounds"), [(1.0, "1 round"), (2.1, "2 rounds"), (8, "4 rounds")])
def test_rounds_of_an_exchange_follow_the_skew(plan, skew, rounds):
    """Of buckets with room for twice the even share."""
    assert plan.exchange.factor == 2.0
    (line,) = (line for line in told(plan, skew=skew).splitlines() if "exchange" in line)
    assert line.endswith(f"takes {rounds}")


def test_a_run_without_an_exchange_says_nothing_of_one(plan):
    cfg = plan.cfg
    alone = replace(cfg, mesh=replace(cfg.mesh, local=1))
    assert "exchange" not in told(memory_of(alone))


def test_json_has_every_rank_in_bytes(plan, capsys):
    main([*DUAL, "--json"])
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert memory == json.loads(json.dumps(memory_json(plan, 80e9)))
    assert [rank["sum"] for rank in memory["ranks"]] == [rank.total for rank in plan.ranks]
    assert memory["exceeds_by_bytes"] == 0


def test_a_table_a_picture_and_one_line_for_mistakes(plan, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "300")
    picture = tmp_path / "memory.png"
    main([*DUAL, "--memory-bars", str(picture)])
    text = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "memory of a device, GB" in text
    for rank in plan.ranks:
        assert "  ".join(rank.stages) in text


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--skew", "0.5"], "--skew is 0.5; allowed: 1 or more, finite"),
        (["--compile", "--serve"], "--compile and --serve; allowed: one of them"),
        (["--skew", "2", "--serve"], "--skew and --serve; allowed: one of them"),
        (["--skew", "2", "--search"], "--skew and --search; allowed: one of them"),
        (
            ["--memory-bars", "x.png", "--timeline", "./x.png"],
            "--memory-bars and --timeline are both x.png; allowed: a file for each",
        ),
        (["--memory-bars", "x.txt"], "--memory-bars is x.txt; allowed: a file that ends in .png"),
        (["--compile", "--mesh.data", "8192"], "train.rows / train.microbatches is 2; allowed"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(args, line, capsys):
    assert line in mistake_of(main, [*DUAL, *args], capsys)
