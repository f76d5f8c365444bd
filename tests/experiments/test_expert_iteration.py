"""The task of expert_iteration: statements that differ, proofs that hold, rates that add up."""

import itertools
import json
from pathlib import Path
from types import ModuleType

import pytest

from dsv3_jax.posttrain.formulas import statement_of
from dsv3_jax.posttrain.natural_deduction import checked
from tests.experiments.loading import run_module
from tests.posttrain.logic import holds
from tests.posttrain.scripted_models import write_lines


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return run_module("expert_iteration", monkeypatch)


def test_of_a_statement_and_its_negation_one_has_a_proof(experiment: ModuleType):
    found = experiment.claims(300, (1, 2, 3, 4), 7)
    assert len({one.statement for one in found}) == 300
    assert found == experiment.claims(300, (1, 2, 3, 4), 7)
    assert {one.is_true for one in found} == {True, False}
    for one in found:
        assert holds(one.statement) is one.is_true
        assert holds(one.negation) is not one.is_true
        assert statement_of(experiment.text_of(one.proved)) == one.proved
        checked(one.proved, one.proof)


def test_what_is_held_out_is_neither_taught_nor_attempted(experiment: ModuleType):
    options = experiment.Options(taught=300, shown=40, attempted=20, held_out=10)
    asked, held_out = experiment.hard(options)
    assert (len(asked), len(held_out)) == (20, 10)
    assert [experiment.connectives(one) for one in held_out] == [2] * 5 + [3] * 5
    known = (*experiment.easy(options), *experiment.longer(options))
    assert len({one.statement for one in (*asked, *held_out, *known)}) == 370
    lines = list(experiment.lines_of(asked[:2]))
    assert [line["id"] for line in lines] == ["0", "not 0", "1", "not 1"]
    assert statement_of(lines[1]["reference"]) == asked[0].negation


def test_rows_are_of_the_models_that_made_the_attempts(experiment: ModuleType, tmp_path: Path):
    asked = experiment.claims(2, (3,), 0)
    kind, verdicts = experiment.KIND, itertools.cycle(["accepted", "rejected"])
    for number, name in ((0, "held_out"), (1, "candidates"), (1, "held_out")):
        place = tmp_path / f"round-00{number}"
        place.mkdir(exist_ok=True)
        entries = [
            {"id": f"{side}{n}", "kind": kind, "candidate": 0}
            | {"verification": {"verdict": "rejected" if side else next(verdicts)}}
            for n in range(2)
            for side in ("", "not ")
        ]
        write_lines(place / f"{name}.jsonl", *entries)
    rates = {"pass": {"1": 0.5, "4": 0.75}}
    one = dict.fromkeys(experiment.COUNTS, 1) | rates | {"round": 1, "cumulative": 0.5}
    rounds = [{"round": 0, "held out": rates}, one | {"held out": rates}]
    (tmp_path / "report.json").write_text(json.dumps({"rounds": rounds}))
    rows = experiment.rows_of(tmp_path, asked, asked)
    assert [row["model after round"] for row in rows] == [0, 1]
    assert "pass" in rows[0]
    assert "pass" not in rows[1]
    assert rows[0]["by connectives"] == {"2": 0.0, "3": 0.5}
    assert rows[1]["held out by connectives"] == {"2": 0.0, "3": 0.5}
    beside = {name: said for name, said in rows[1].items() if name.startswith("held out")}
    rows.append({"model after round": "none", **beside})
    lines = experiment.table(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| 0 | 50.0% | ")
    experiment.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
