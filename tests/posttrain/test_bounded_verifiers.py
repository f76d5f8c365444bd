"""Verifiers in processes of their own: what hangs, dies or raises rejects, and the work goes on."""

import time
from pathlib import Path

import pytest

from dsv3_jax.posttrain.bounded_verifiers import bounded
from dsv3_jax.posttrain.completions import Completion
from dsv3_jax.posttrain.verifiers import judged, verifiers
from tests.posttrain.scripted_models import problem

PLUG_IN = """
import os, time
def judge(attempt):
    if attempt.text == "hang":
        time.sleep(600)
    if attempt.text == "die":
        os._exit(3)
    if attempt.text == "raise":
        raise KeyError("no")
    if attempt.text == "half":
        return 0.5, "half of it"
    if attempt.text == "nan":
        return float("nan")
    return attempt.text == attempt.reference
"""


def test_a_plug_in_may_do_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own_bounded.py").write_text(PLUG_IN)
    monkeypatch.syspath_prepend(tmp_path)
    begun = time.monotonic()
    said = {}
    with bounded(verifiers(["python:own_bounded:judge"]), 1.0) as judges:
        for text in ("2", "3", "hang", "die", "raise", "half", "nan", "2"):
            said[text], by = judged(problem(), Completion(text), judges)
            assert by == "python:own_bounded:judge"
    assert time.monotonic() - begun < 300  # 600 s of sleep were cut
    assert {text for text, verdict in said.items() if verdict.accepted} == {"2"}
    notes = {text: verdict.note for text, verdict in said.items()}
    assert notes["hang"] == "took longer than 1 s"
    assert notes["die"] == "its process ended with 3"
    assert notes["raise"] == "KeyError: 'no'"
    assert notes["half"] == "half of it"
    assert "allowed: a finite number" in notes["nan"]


def test_verdicts_are_those_of_the_verifiers_themselves():
    specs = ["reasoning_original=proof", "regex:copy"]
    plain = verifiers(specs)
    cases = ("2. p by copy 1", "2. p | p by or_left 1", "2. q by copy 1", "copy")
    with bounded(plain, 10.0) as judges:
        for text in cases:
            asked = problem(reference="p |- p"), Completion(text)
            assert judged(*asked, judges) == judged(*asked, plain)
            other = problem(reference="p |- p", kind="writing"), Completion(text)
            assert judged(*other, judges) == judged(*other, plain)
