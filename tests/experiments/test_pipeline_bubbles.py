"""The tables of experiments/pipeline_bubbles, and the file of measured times."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

RUN = Path(__file__).parents[2] / "experiments" / "pipeline_bubbles" / "run.py"


@pytest.fixture(scope="module")
def bubbles() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pipeline_bubbles", RUN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.RANKS = (4, 8)  # half of the time is in 16
    return module


def cells(row: str) -> list[str]:
    return [cell.strip(" `") for cell in row.strip("|").split("|")]


def test_formula_and_simulation_agree_and_the_readme_has_both(bubbles: ModuleType):
    readme = RUN.with_name("README.md").read_text()
    rows = [*bubbles.bubble_rows(bubbles.NOTHING_HIDDEN), *bubbles.memory_rows(8)]
    for row in rows:
        assert row in readme
    for row in rows[:10]:
        _, _, formula, simulated, _, _, blocking = cells(row)
        assert formula == simulated == blocking


def test_a_step_of_half_as_long_parts_counts_half(bubbles: ModuleType):
    steps = {name: bubbles.simulated(name, 4, bubbles.NOTHING_HIDDEN) for name in bubbles.NAMES}
    assert steps["dualpipev"].makespan == 2 * 16 * 3 + 6
    assert bubbles.model_step(steps["dualpipev"]) == 51
    assert bubbles.model_step(steps["1f1b"]) == steps["1f1b"].makespan == 57


def test_measured_times_make_a_table(bubbles: ModuleType, tmp_path: Path, capsys):
    times = tmp_path / "times.json"
    times.write_text(json.dumps({"F": 2, "B": 4, "W": 2, "FB": 6, "b": 3}))
    bubbles.main(["--times", str(times)])
    lines = capsys.readouterr().out.splitlines()
    assert "F = 2, B = 4, W = 2, FB = 6, b = 3" in lines
    (row,) = (cells(line) for line in lines if line.startswith("| `1f1b` | 8 | 42 "))
    assert row[3] == "42"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"F": 1, "B": 2, "W": 1}', "no time of FB"),
        ('{"F": 1, "B": 2, "W": 1, "FB": 3, "X": 1}', "X is no kind; allowed: F, B, W, FB, b"),
        ('{"F": 1, "B": "2", "W": 1, "FB": 3}', "time of B is '2'; allowed: seconds"),
        ('{"F": 1, "B": 2, "W": 0, "FB": 3}', "time of W is 0; allowed: seconds above 0"),
        ('{"F": 1, "B": 2, "W": 2, "FB": 3}', "B is no longer than W; allowed: a time of b"),
        ("[]", "no table of fields"),
    ],
)
def test_a_file_without_times_is_told_in_a_line(bubbles, text, said, tmp_path: Path, capsys):
    (tmp_path / "times.json").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        bubbles.main(["--times", str(tmp_path / "times.json")])
    assert stopped.value.code == 2
    out = capsys.readouterr()
    assert said in out.err
    assert not out.out
