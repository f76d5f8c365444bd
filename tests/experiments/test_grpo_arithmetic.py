"""The task of grpo_arithmetic: sums that differ, answers that are right, what is shown of them."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from dsv3_jax.data.conversations import read_conversations
from dsv3_jax.posttrain.attempts import Attempt
from dsv3_jax.posttrain.reward_rules import rule
from dsv3_jax.posttrain.rl_prompts import read_prompts
from tests.experiments.loading import run_module


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return run_module("grpo_arithmetic", monkeypatch)


def number(text: str) -> int:
    return int(text.replace(" ", ""))


def numbers(question: str) -> list[int]:
    return [number(part) for part in question.removesuffix(" =").split(" + ")]


def test_who_forgets_to_carry_adds_digits(experiment: ModuleType):
    found = [experiment.without_carries(*pair) for pair in ((37, 85), (21, 34), (95, 5), (9, 9))]
    assert found == [12, 55, 90, 8]


def test_no_sum_is_taught_rewarded_for_or_asked_twice(experiment: ModuleType, tmp_path: Path):
    experiment.write_tasks(tmp_path)
    pairs = [
        tuple(message["content"] for message in one.messages)
        for one in read_conversations(str(tmp_path / "taught.jsonl"))
    ]
    assert len(pairs) == experiment.TAUGHT
    for name, count in (("prompts", experiment.REWARDED), ("asked", experiment.ASKED)):
        prompts = read_prompts(tmp_path / f"{name}.jsonl")
        assert len(prompts) == count
        pairs += [(prompt.prompt, prompt.reference) for prompt in prompts]
    assert len({question for question, _ in pairs}) == len(pairs)
    right = [sum(numbers(question)) == number(answer) for question, answer in pairs]
    assert all(right[experiment.TAUGHT :])
    forgotten = [experiment.without_carries(*numbers(question)) for question, _ in pairs]
    for (_, answer), is_right, other in zip(pairs, right, forgotten, strict=True):
        assert is_right or number(answer) == other
    taught = list(zip(pairs, right, forgotten, strict=True))[: experiment.TAUGHT]
    shown = [is_right for (q, _), is_right, other in taught if sum(numbers(q)) != other]
    assert abs(sum(shown) / len(shown) - (1 - experiment.FORGOTTEN)) < 0.03
    texts = "".join(file.read_text() for file in tmp_path.glob("sums-*.txt")).splitlines()
    assert sorted(texts) == sorted(f"{q} {a}" for q, a in pairs[: experiment.TAUGHT])


def test_a_right_sum_is_what_the_reward_accepts(experiment: ModuleType):
    attempt = Attempt("3 7 + 8 5 =", "1 2 2", reference=experiment.digits(122))
    assert rule("exact")(attempt)[0] == 1
    assert rule("exact")(Attempt("", "1 2 3", reference="1 2 2"))[0] == 0


def test_scores_and_rewards_are_shown(
    experiment: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
):
    scores = {
        "taught": {0: experiment.Score(0.25, 0.2, 0.5)},
        "seed 0": {20: experiment.Score(0.5, 0.4, 0.75)},
    }
    rewards = {"seed 0": [0.0] * 10 + [1.0] * 10}
    experiment.print_table(scores, rewards)
    taught, rewarded = capsys.readouterr().out.splitlines()[2:]
    assert taught == "| taught | 0 | 25.0% | 20.0% | 50.0% |  |"
    assert rewarded == "| seed 0 | 20 | 50.0% | 40.0% | 75.0% | 1.000 |"
    experiment.draw(scores, rewards, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    entries = [{"kind": "train", "reward": 0.5}, {"kind": "validation"}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, entries)))
    assert experiment.rewards_of(tmp_path) == [0.5]
