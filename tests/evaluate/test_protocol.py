"""The report's protocol: what runs how often, mean and spread, what is scored how."""

import numpy as np
import pytest

from dsv3_jax.evaluate.protocol import (
    BY_GENERATION,
    BY_PERPLEXITY,
    Run,
    benchmark_of,
    check_runs,
    chosen,
    count_as_equal,
    runs_of,
    scoring_of,
    summary,
)


def test_a_small_set_that_is_written_runs_at_every_temperature_with_new_seeds():
    runs = runs_of(50, True, (0.2, 0.7), repeats=3, seed=5)
    assert [run.temperature for run in runs] == [0.2] * 3 + [0.7] * 3
    more = runs_of(50, True, (0.2, 0.7), repeats=3, seed=6)
    assert len({run.seed for run in (*runs, *more)}) == 12


def test_all_else_runs_once_as_the_task_says():
    once = (Run(None, 5),)
    assert [run.temperature for run in runs_of(999, True, (0.7,), 1, 5)] == [0.7]
    assert runs_of(1000, True, (0.7,), 3, 5) == once
    assert runs_of(50, False, (0.7,), 3, 5) == once
    assert runs_of(50, True, (), 3, 5) == once
    assert [run.temperature for run in runs_of(50, True, (0.0,), 3, 5)] == [0.0]


def test_seeds_are_what_an_engine_takes_and_stay_what_they_are():
    """Whoever repeats a run has its texts again."""
    seeds = [run.seed for run in runs_of(50, True, (1.0,), 100, 2**32 - 1)]
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert [run.seed for run in runs_of(50, True, (1.0,), 2, 0)] == [4136046139, 3471598235]


def test_mean_and_spread_are_numpys():
    scores = np.random.default_rng(0).random(6).tolist()
    found = summary(scores)
    assert found.mean == pytest.approx(np.mean(scores), rel=1e-12)
    assert found.spread == pytest.approx(np.std(scores, ddof=1), rel=1e-12)
    assert (found.least, found.most, found.runs) == (min(scores), max(scores), 6)
    assert summary([0.5]).spread is None


def test_gaps_up_to_three_tenths_count_as_equal():
    assert count_as_equal(87.1, 86.8)
    assert count_as_equal(86.8, 87.1)
    assert not count_as_equal(87.1, 86.79)


def test_chat_models_have_temperatures_of_their_own():
    assert chosen((), chat=False) == ()
    assert len(chosen((), chat=True)) > 1
    assert chosen((0.5,), chat=True) == (0.5,)


@pytest.mark.parametrize(
    ("task", "benchmark", "scoring"),
    [
        ("mmlu_astronomy", "MMLU", "perplexity"),
        ("mmlu_pro", "MMLU-Pro", "perplexity"),
        ("ceval-valid_law", "C-Eval", "perplexity"),
        ("gsm8k", "GSM8K", "generation"),
        ("humaneval_instruct", "HumanEval", "generation"),
        ("arc_easy", "ARC-Easy", "perplexity"),
        ("racetrack", None, None),
        ("wikitext", None, None),
    ],
)
def test_tasks_are_known_by_the_names_of_the_report(task, benchmark, scoring):
    assert benchmark_of(task) == benchmark
    assert scoring_of(task) == scoring


def test_the_two_lists_are_the_reports():
    """Section 4.4.1 has 15 of each kind, Pile-test aside."""
    assert len(set(BY_PERPLEXITY)) == len(set(BY_GENERATION)) == 15
    assert not {*BY_PERPLEXITY} & {*BY_GENERATION}


@pytest.mark.parametrize(
    ("temperatures", "repeats", "said"),
    [
        ((0.5,), 0, "--repeats is 0; allowed: 1 or more"),
        ((-0.5,), 1, "--temperatures has -0.5; allowed: from 0"),
        ((float("nan"),), 1, "--temperatures has nan; allowed: from 0"),
        ((0.0,), 2, "the same each time; allowed: with --temperatures above 0"),
        ((), 2, "the same each time"),
    ],
)
def test_runs_that_cannot_be_are_refused(temperatures, repeats, said):
    with pytest.raises(ValueError, match=said):
        check_runs(temperatures, repeats, chat=False)
    check_runs((), 2, chat=True)
