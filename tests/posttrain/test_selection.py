"""Which candidates become samples: every fate, the order of judgement, and the sample itself."""

from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.posttrain.contamination import EvaluationTexts
from dsv3_jax.posttrain.journal import Key
from dsv3_jax.posttrain.selection import Candidate, candidates_of, sample_of, select
from dsv3_jax.posttrain.synthesis_options import Selection
from tests.posttrain.scripted_models import problem

ONE = problem(id="1", prompt="one?", messages=[{"role": "user", "content": "one?"}])
TWO = problem(id="2", prompt="two?", messages=[{"role": "user", "content": "two?"}])


def candidate(of=ONE, number: int = 0, text: str = "text", **changes: Any) -> Candidate:
    entry = {
        "id": of.id,
        "kind": of.kind,
        "candidate": number,
        "hash": of.hash,
        "seed": 5,
        "source": {"model": "m"},
        "time": "now",
        "version": "v",
        "text": text,
        "reasoning": None,
        "tokens": 3,
        "verifier": "boxed",
        "verification": {"by": "rule", "verdict": "accepted", "note": "2"},
    }
    return Candidate(of, entry | changes)


def fates(*candidates: Candidate, texts=None, reviews=None, **options: Any) -> list[str]:
    selected = select(candidates, Selection(**options), texts, reviews or {})
    assert len(selected.fates) == len(candidates)
    assert [one.key for one in selected.kept] == [
        key for key in (one.key for one in selected.kept) if selected.fates[key] == "kept"
    ]
    return [selected.fates[one.key] for one in candidates]


REJECTED = {"verification": {"by": "rule", "verdict": "rejected", "note": ""}}


def test_failed_and_rejected_candidates_go_first_and_the_most_of_a_problem_last():
    found = fates(
        candidate(number=0, failed="too long"),
        candidate(number=1, **REJECTED),
        candidate(number=2, text="same"),
        candidate(number=3, text=" SAME "),
        candidate(number=4, text="other"),
        candidate(TWO, 0, "same"),
    )
    assert found == ["failed", "rejected", "kept", "duplicate", "beyond --keep", "kept"]


def test_a_person_has_the_last_word_on_what_verifiers_let_pass():
    no, yes = ({"by": "human", "verdict": said, "note": ""} for said in ("rejected", "accepted"))
    a, b = candidate(number=0, text="a"), candidate(number=1, text="b", **REJECTED)
    reviews = {Key("1", ONE.kind, 0): no, Key("1", ONE.kind, 1): yes}
    assert fates(a, b, reviews=reviews) == ["rejected by a person", "rejected"]


def test_who_has_rejected_a_candidate_and_why_is_told():
    said = {"by": "rule", "verdict": "rejected", "note": "3 differs from the reference"}
    review = {"by": "human", "verdict": "rejected", "note": "rude"}
    three = candidate(failed="too long"), candidate(number=1, verification=said), candidate(TWO)
    selected = select(three, Selection(), None, {three[2].key: review})
    assert [selected.because[one.key] for one in three] == [
        *("too long", "boxed: 3 differs from the reference", "rude")
    ]


def test_the_shortest_are_preferred_if_wished_problem_by_problem():
    long, short, other = (
        candidate(number=0, text="a long answer"),
        candidate(number=1, text="short"),
        candidate(TWO, 0, "tiny"),
    )
    assert fates(long, short, other) == ["kept", "beyond --keep", "kept"]
    assert fates(long, short, other, prefer="shortest") == ["beyond --keep", "kept", "kept"]
    both = select([long, short, other], Selection(keep=2, prefer="shortest"), None, {})
    assert [one.entry["text"] for one in both.kept] == ["short", "a long answer", "tiny"]


def test_near_duplicates_go_from_the_threshold_on_and_say_of_what():
    words = "one two three four five six seven eight nine ten"
    pair = candidate(number=0, text=words), candidate(number=1, text=words + " more")
    assert fates(*pair, keep=2) == ["kept", "near duplicate"]
    assert fates(*pair, keep=2, near_duplicates=0.95) == ["kept", "kept"]
    assert fates(*pair, keep=2, near_duplicates=0) == ["kept", "kept"]
    selected = select(pair, Selection(keep=2), None, {})
    assert selected.because == {pair[1].key: "1 reasoning_original 0"}


WORDS = "one two three four five six seven eight nine ten"


def test_a_candidate_beyond_the_most_of_its_problem_stands_in_no_others_way():
    many = (
        candidate(number=0, text="something else"),
        candidate(number=1, text=WORDS),
        candidate(TWO, 0, f"{WORDS} more"),
        candidate(TWO, 1, WORDS),
    )
    low = {"near_duplicates": 0.6}
    assert fates(*many, **low) == ["kept", "beyond --keep", "kept", "near duplicate"]
    selected = select(many, Selection(**low), None, {})
    assert selected.because == {many[3].key: "2 reasoning_original 0"}


def test_a_contaminated_candidate_stands_in_no_others_way():
    texts = EvaluationTexts([("exam", "nine ten more")], 3)
    pair = candidate(number=0, text=f"{WORDS} more"), candidate(number=1, text=WORDS)
    assert fates(*pair, texts=texts, near_duplicates=0.6) == ["contaminated", "kept"]


def test_a_problems_two_samples_are_no_duplicates_of_each_other():
    twin = problem(id="1", prompt="one?", kind="reasoning_reflective")
    assert fates(candidate(text="a b c d e f"), candidate(twin, 0, "a b c d e f")) == ["kept"] * 2


def test_conversations_that_end_alike_are_no_duplicates():
    last = {"role": "user", "content": "why?"}
    one, two, same = (
        problem(id=text, prompt="why?", messages=[{"role": "user", "content": text[0]}, last])
        for text in ("a1", "b1", "a2")
    )
    found = fates(candidate(one), candidate(two), candidate(same), near_duplicates=0)
    assert found == ["kept", "kept", "duplicate"]


def test_contaminated_answers_go_and_make_room():
    texts = EvaluationTexts([("exam line 3", "two plus two is four")], 5)
    pair = candidate(number=0, text="Two plus two is four!"), candidate(number=1, text="4")
    assert fates(*pair, texts=texts) == ["contaminated", "kept"]
    selected = select(pair, Selection(), texts, {})
    assert selected.because == {pair[0].key: "exam line 3"}
    assert len(selected.accepted) == 2


def test_candidates_stand_in_the_order_of_the_file_whatever_order_they_came_in():
    entries = {
        one.key: one.entry
        for one in (candidate(TWO, 1), candidate(ONE, 1), candidate(TWO, 0), candidate(ONE, 0))
    }
    gone = candidate(problem(id="3"), 0)
    found = candidates_of([ONE, TWO], entries | {gone.key: gone.entry})
    assert [(one.problem.id, one.entry["candidate"]) for one in found] == [
        *(("1", 0), ("1", 1), ("2", 0), ("2", 1)),
    ]


@pytest.mark.parametrize(("role", "fate"), [("system", "kept"), ("user", "contaminated")])
def test_every_turn_but_the_system_prompt_can_show_an_evaluation_text(role: str, fate: str):
    texts = EvaluationTexts([("exam", "one two three")], 3)
    turns = [{"role": role, "content": "one two three"}, {"role": "user", "content": "so?"}]
    of = problem(prompt="so?", messages=turns)
    assert fates(candidate(of), texts=texts) == [fate]


def test_system_prompts_make_no_difference_to_duplicates():
    last = {"role": "user", "content": "so?"}
    one, two = (
        problem(id=text, prompt="so?", messages=[{"role": "system", "content": text}, last])
        for text in "ab"
    )
    assert fates(candidate(one), candidate(two)) == ["kept", "duplicate"]


@pytest.mark.parametrize("keeps", [False, True])
def test_a_sample_holds_its_conversation_and_where_it_comes_from(keeps: bool):
    one = candidate(problem(keeps_reasoning=keeps), 3, "4", reasoning="hm")
    said = {"by": "human", "verdict": "accepted", "note": "fine"}
    sample = sample_of(one, Path("p.jsonl"), {"temperature": 1.0}, {})
    answer = "<think>\nhm\n</think>\n\n4" if keeps else "4"
    assert sample["messages"] == [
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": answer},
    ]
    assert sample["kind"] == "reasoning_original"
    assert sample["verification"] == {"by": "rule", "verdict": "accepted", "note": "2"}
    made = sample["provenance"]
    assert made["sampling"] == {"temperature": 1.0, "seed": 5}
    assert made["prompt"] == {"id": "1", "hash": one.problem.hash, "file": "p.jsonl"}
    assert (made["model"], made["candidate"], made["verifier"]) == ("m", 3, "boxed")
    assert (made["verdict"], made["time"], made["version"]) == ("accepted", "now", "v")
    assert sample_of(one, Path("p"), {}, {one.key: said})["verification"] == said


def test_an_original_response_was_sampled_from_nothing():
    one = candidate(source={"model": None, "file": "p.jsonl line 1"})
    made = sample_of(one, Path("p.jsonl"), {"temperature": 1.0}, {})["provenance"]
    assert (made["sampling"], made["file"]) == (None, "p.jsonl line 1")
