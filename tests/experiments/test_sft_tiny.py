"""The task of sft_tiny: questions that differ, answers that are right, shares that add up."""

from pathlib import Path
from types import ModuleType

import pytest

from dsv3_jax.data.conversations import read_conversations
from tests.experiments.loading import run_module

FOLDER = Path(__file__).parents[2] / "experiments" / "sft_tiny"


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return run_module("sft_tiny", monkeypatch)


def test_no_question_is_learned_and_asked(experiment: ModuleType, tmp_path: Path):
    learned, asked = experiment.divided(500, 60)
    assert (len(learned), len(asked)) == (500, 60)
    assert len(set(learned) | set(asked)) == 560
    assert experiment.divided(500, 60) == (learned, asked)
    lengths = [len(question.split()) for question, _ in asked]
    assert {lengths.count(length) for length in experiment.LENGTHS} == {30}
    for question, answer in asked:
        assert question == answer[::-1]
    experiment.write(tmp_path / "a.jsonl", learned)
    read = list(read_conversations(str(tmp_path / "a.jsonl")))
    assert [tuple(m["content"] for m in one.messages) for one in read] == learned


def test_shares_are_of_each_length(experiment: ModuleType, tmp_path: Path):
    asked = [("a b c", ""), ("d e f", ""), ("a b c d", "")]
    found = experiment.by_length(asked, [True, False, True])
    assert found == {3: 0.5, 4: 1.0}
    assert experiment.mean(found) == 0.75
    line = experiment.table_line("after", 1200, found)
    assert line == "| after | 1,200 | 50.0% | 100.0% | 75.0% |"
    experiment.draw({"tiny": {50: 0.1, 100: 0.9}}, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
