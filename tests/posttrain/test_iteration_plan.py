"""What is read before a model is opened: faults are one line, with file and line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.posttrain.iteration_plan import Inputs, read_plan
from tests.posttrain.scripted_models import write_lines


def plan(folder: Path, *lines: Any, **changes: Any):
    file = write_lines(folder / "s.jsonl", *lines)
    given = {"statements": file, "checkpoint": folder, "verifiers": ["proof"]}
    return read_plan(Inputs(**given | changes))


GOOD = {"prompt": "p |- p", "reference": "p |- p"}
TURNS = [{"role": "user", "content": "p |- P"}, {"role": "assistant", "content": "2. p by copy 1"}]


@pytest.mark.parametrize(
    ("line", "changes", "said"),
    [
        ({"prompt": "p"}, {}, "s.jsonl line 1: no reference; --verifier proof compares with one"),
        (GOOD | {"reference": "p |- "}, {}, "--verifier proof: ' ' is no formula"),
        (GOOD | {"reference": "~" * 60 + "p"}, {}, "--verifier proof: a formula is deeper than"),
        (GOOD | {"response": "x"}, {}, "s.jsonl line 1: a response; allowed: what is to be"),
        (GOOD | {"goal": "x"}, {}, "unknown field 'goal'"),
        (GOOD, {"verifiers": ["prof"]}, "--verifier is 'prof'; allowed: exact, boxed, proof"),
        (GOOD, {"verifiers": ["proof:x"]}, "--verifier is 'proof:x'; allowed"),
        (GOOD, {"verifiers": ["writing=proof"]}, "no --verifier judges the kind reasoning_orig"),
        (GOOD, {"kind": "lemma"}, "--kind is 'lemma'"),
    ],
)
def test_faults_of_statements_and_verifiers(tmp_path: Path, line: dict, changes: dict, said: str):
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the message is compared below
        plan(tmp_path, line, **changes)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_held_out_is_nowhere_else(tmp_path: Path):
    held_out = write_lines(tmp_path / "h.jsonl", GOOD)
    with pytest.raises(ValueError, match=r"h\.jsonl line 1 is held out and stands .*s\.jsonl line"):
        plan(tmp_path, GOOD, held_out=held_out)
    samples = write_lines(tmp_path / "e.jsonl", {"messages": TURNS})
    other = {"prompt": "q |- q", "reference": "q |- q"}
    with pytest.raises(ValueError, match="is held out and stands in --samples"):
        plan(tmp_path, other, held_out=held_out, samples=samples)
    found = plan(tmp_path, GOOD, samples=samples)
    assert found.known == {"p |- p 2. p by copy 1"}
    assert [json.loads(line) for line in found.examples] == [{"messages": TURNS}]


def test_samples_that_are_no_conversations_are_refused_and_rejected_ones_left_out(tmp_path: Path):
    bad = write_lines(tmp_path / "e.jsonl", {"messages": TURNS[:1]})
    with pytest.raises(ValueError, match=r"e\.jsonl line 1: messages holds no answer"):
        plan(tmp_path, GOOD, samples=bad)
    rejected = {"messages": TURNS, "verification": {"by": "human", "verdict": "rejected"}}
    kept = {"messages": [{"role": "user", "content": "a"}, TURNS[1]]}
    some = write_lines(tmp_path / "e.jsonl", rejected, kept)
    assert [json.loads(line) for line in plan(tmp_path, GOOD, samples=some).examples] == [kept]


@pytest.mark.parametrize("name", ["e.jsonl", "e.jsonl.gz"])
def test_samples_may_be_packed_and_hold_any_end_of_a_line(tmp_path: Path, name: str):
    kept = {"messages": [{"role": "user", "content": "a\u2028ä"}, TURNS[1]]}
    lines = [json.dumps(one, ensure_ascii=False) for one in ({"messages": TURNS}, kept)]
    data = "\n".join([lines[0].replace(", ", ",\r"), *lines]).encode()
    file = tmp_path / name
    file.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    found = plan(tmp_path, GOOD, samples=file).examples
    assert [json.loads(line) for line in found] == [{"messages": TURNS}] * 2 + [kept]
    assert not any(set(line) & set("\r\n") for line in found)


def test_contaminated_statements_are_not_asked(tmp_path: Path):
    exam = tmp_path / "exam.txt"
    exam.write_text("P |- P")
    other = {"prompt": "q |- q", "reference": "q |- q"}
    found = plan(tmp_path, GOOD, other, decontaminate=[exam])
    assert ([one.prompt for one in found.statements], found.skipped) == (["q |- q"], 1)
    with pytest.raises(ValueError, match="--decontaminate leaves none of its statements"):
        plan(tmp_path, GOOD, decontaminate=[exam])
