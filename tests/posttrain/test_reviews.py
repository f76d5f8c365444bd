"""People's verdicts are read out of a copy of the samples."""

import json
from pathlib import Path

import pytest

from dsv3_jax.posttrain.journal import Key
from dsv3_jax.posttrain.reviews import read_reviews


def sample(
    number: object,
    by: str,
    verdict: str | None,
    note: object = "",
    named: object = "1",
    kind: object = "writing",
) -> str:
    made = {"prompt": {"id": named}, "candidate": number}
    said = {"by": by, "verdict": verdict, "note": note}
    return json.dumps({"kind": kind, "verification": said, "provenance": made})


def test_lines_that_people_judged_are_read_and_others_passed_over(tmp_path: Path):
    lines = (
        sample(0, "human", "rejected", "dull"),
        "",
        sample(1, "none", None),
        sample(2, "human", "accepted"),
    )
    (tmp_path / "r").write_text("\n".join(lines))
    assert read_reviews(tmp_path / "r") == {
        Key("1", "writing", 0): {"by": "human", "verdict": "rejected", "note": "dull"},
        Key("1", "writing", 2): {"by": "human", "verdict": "accepted", "note": ""},
    }
    assert read_reviews(None) == {}


def test_half_a_surrogate_pair_in_a_note_is_replaced(tmp_path: Path):
    (tmp_path / "r").write_text(sample(0, "human", "rejected", "so \ud800"))
    (said,) = read_reviews(tmp_path / "r").values()
    assert said["note"] == "so ?"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "no JSON"),
        ("{}", "no sample of this command"),
        (sample(0, "human", "good"), "verification.verdict is 'good'; allowed: accepted, rejected"),
        (sample(0, "human", "accepted", 1), "verification.note is 1; allowed: text"),
        (
            sample(0, "human", "accepted", named=["1"]),
            "provenance.prompt.id is ['1']; allowed: text",
        ),
        (sample(0, "human", "accepted", kind={}), "kind is {}; allowed: text"),
        (sample("0", "human", "accepted"), "provenance.candidate is '0'; allowed: a whole number"),
        (
            sample(True, "human", "accepted"),
            "provenance.candidate is True; allowed: a whole number",
        ),
        (sample(0.0, "human", "accepted"), "provenance.candidate is 0.0; allowed: a whole number"),
    ],
)
def test_a_line_that_is_none_is_told_with_its_number(tmp_path: Path, line: str, said: str):
    (tmp_path / "r").write_text(sample(0, "none", None) + "\n" + line)
    with pytest.raises(ValueError, match="r line 2: ") as failed:
        read_reviews(tmp_path / "r")
    assert said in str(failed.value)
