"""Results are written whole: scores, their spread, and what repeats them."""

import json
import math

import pytest

from dsv3_jax.evaluate.protocol import Run
from dsv3_jax.evaluate.results import Results, TaskScore, write_results
from dsv3_jax.evaluate.rolling import TextScore

MADE = {"checkpoint": {"name": "run-001, step 5"}, "command": "python -m x --a 'b c'", "seed": 7}
COUNTS = {"scored": 1200, "written": 3, "cut": 0, "shortened": 1}


def score(**changes) -> TaskScore:
    fields = {
        "task": "gsm8k",
        "version": "3.0",
        "shots": 5,
        "metric": "exact_match",
        "filter": "strict-match",
        "scored": "generate_until",
        "samples": 50,
        "of": 50,
        "higher_is_better": True,
        "error": 0.05,
        "runs": [Run(0.3, 1), Run(0.3, 2), Run(0.9, 3)],
        "values": [0.5, 0.7, 0.6],
    }
    return TaskScore(**fields | changes)


def rows_of(page: str) -> list[list[str]]:
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_json_holds_every_run_with_mean_and_spread():
    results = Results(MADE, COUNTS, [score()], {"a.txt": TextScore(8.0, 4, 10)})
    content = json.loads(results.to_json())
    (task,) = content["tasks"]
    assert task["runs"] == [
        {"temperature": 0.3, "seed": 1, "value": 0.5},
        {"temperature": 0.3, "seed": 2, "value": 0.7},
        {"temperature": 0.9, "seed": 3, "value": 0.6},
    ]
    assert task["mean"] == pytest.approx(0.6)
    assert task["spread"] == pytest.approx(0.1)
    assert (task["benchmark"], task["scored_by_report"]) == ("GSM8K", "generation")
    text = content["texts"]["a.txt"]
    assert text["bits_per_byte"] == pytest.approx(8 / math.log(2) / 10)
    assert text["nats_per_token"] == 2
    assert content["made"] == MADE
    assert content["counts"] == COUNTS


def test_what_is_not_finite_is_null():
    results = Results(MADE, COUNTS, [score(values=[math.nan], runs=[Run()])])
    (task,) = json.loads(results.to_json())["tasks"]
    assert task["mean"] is None
    assert task["runs"] == [{"temperature": None, "seed": 0, "value": None}]


def test_the_page_has_a_row_a_score_and_says_how_often_it_ran():
    several, once = (
        score(),
        score(task="mmlu|x", of=900, runs=[Run()], values=[0.25], filter="none"),
    )
    page = Results(MADE, COUNTS, [several, once], {"a.txt": TextScore(8.0, 4, 10)}).to_markdown()
    rows = rows_of(page)
    assert rows[2][4:] == [
        "exact_match, strict-match",
        "0.6000",
        "0.0500",
        "0.1000, 0.5000 to 0.7000",
        "2 at 0.3, 1 at 0.9",
    ]
    assert rows[3][0] == "mmlu\\|x"
    assert rows[3][3:6] == ["first 50 of 900", "exact_match", "0.2500"]
    assert rows[3][-1] == "1 as the task says"
    assert rows[-1] == ["a.txt", "10", "4", "2.0000", "7.389", "1.1542"]
    assert "- command: `python -m x --a 'b c'`" in page
    assert "  - name: `run-001, step 5`" in page
    assert "Rows scored: 1,200, texts written: 3" in page


def test_scores_that_the_report_takes_the_other_way_are_named():
    ways = [score(scored="multiple_choice"), score(task="mmlu_x"), score(), score(task="own")]
    assert [one.departs for one in ways] == [True, True, False, False]
    page = Results(MADE, COUNTS, ways).to_markdown()
    assert "the other way (4.4.1) on: gsm8k, mmlu_x." in page
    assert "the other way" not in Results(MADE, COUNTS, [score()]).to_markdown()


def test_the_folder_has_a_file_of_samples_for_each_task(tmp_path):
    samples = {"a/b": [{"doc_id": 0, "x": math.inf}, {"doc_id": 1, "x": 0.5}], "own": []}
    write_results(tmp_path, Results(MADE, COUNTS, [score()]), samples)
    names = {"results.json", "results.md", "samples_a_b.jsonl", "samples_own.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == names
    lines = (tmp_path / "samples_a_b.jsonl").read_text().splitlines()
    assert [json.loads(line)["x"] for line in lines] == [None, 0.5]
