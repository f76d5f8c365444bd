"""The command: a round with a real model and a real fine-tuning, and one line for what cannot
work.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from dsv3_jax.expert_iteration import divided, main
from dsv3_jax.inference import programs
from dsv3_jax.inference.programs import Programs
from dsv3_jax.posttrain import iteration_report
from tests.commands import help_of, mistake_of
from tests.posttrain.scripted_models import write_lines
from tests.runs import SmallRun
from tests.shapes import FAST_COMPILATION
from tests.tuning import FLAGS, Tuning


@pytest.fixture(scope="module")
def tuning(tmp_path_factory: pytest.TempPathFactory) -> Tuning:
    made = Tuning(tmp_path_factory.mktemp("iteration"))
    made.make()
    return made


@pytest.fixture
def statements(tmp_path: Path) -> Path:
    lines = [{"prompt": f"{n}+{n}", "reference": str(2 * n), "id": f"{n}"} for n in range(3)]
    return write_lines(tmp_path / "statements.jsonl", *lines)


@pytest.fixture
def quick(tuning: Tuning, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiles without optimising, and what engines of the same sizes share but once; draws no
    pictures.
    """
    known, real = {}, Programs._compile

    def compile_(self, body, *args):
        key = f"{body} {jax.tree.map(np.shape, args[2:])}"
        if key not in known:
            known[key] = real(self, body, *args)
        return known[key]

    monkeypatch.setattr(Programs, "_compile", compile_)
    monkeypatch.setattr(programs, "COMPILER_OPTIONS", FAST_COMPILATION)
    monkeypatch.setattr(iteration_report, "draw_rates", lambda rounds, path: None)
    with SmallRun(tuning.home).quick():
        yield


def test_what_stands_behind_two_dashes_is_for_fine_tuning():
    assert divided(["--out", "a", "--", "--epochs", "3", "--"]) == (
        ["--out", "a"],
        ["--epochs", "3", "--"],
    )
    assert divided(["--out", "a"]) == (["--out", "a"], [])


@pytest.mark.slow
def test_a_model_attempts_learns_and_attempts_again(
    tuning: Tuning, statements: Path, tmp_path: Path, quick: None, capsys
):
    """A random model writes any byte: most of what it writes has a letter or none, and counts."""
    out = tmp_path / "out"
    held_out = write_lines(tmp_path / "h.jsonl", {"prompt": "9+9", "reference": "18"})
    args = ["--statements", statements, "--held-out", held_out, "--out", out]
    args += ["--samples", tuning.samples, "--checkpoint", tuning.model, "--verifier", "words:1-9"]
    args += ["--attempts", 2, "--max-tokens", 6, "--stop", *"etaoinshrdlu0123456789 ", "--rows", 1]
    args += ["--seed", 4, "--page-slots", 16, "--chunk", 16, "--pages", 4, "--tune-from", "last"]
    flags = ["--", *FLAGS, "--train.steps", 2]
    assert not main([*map(str, (*args, "--rounds", 1, *flags))])
    assert not main([*map(str, (*args, "--rounds", 2, *flags))])
    said = capsys.readouterr().out
    assert said.endswith(f"{out / 'samples.jsonl'}; see {out / 'report.md'}\n")
    rounds = json.loads((out / "report.json").read_text())["rounds"]
    assert [one["tuned"] for one in rounds[1:]] == [True, True]
    assert rounds[1]["model"] == {"model": "model", "step": None}
    assert rounds[2]["model"] == {"model": "model-001", "step": 2}
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == rounds[2]["samples"] > rounds[1]["samples"] > 0
    config = json.loads((out / "round-002" / "model-001" / "config.json").read_text())
    assert config["data"]["source"] == str(out / "round-002" / "data.jsonl")
    weights = (out / "round-002" / "model-001" / "metrics.jsonl").read_text()
    assert f"of step 2 of {out / 'round-001' / 'model-001'}" in weights
    assert not main([*map(str, (*args, "--rounds", 2, *flags))])  # nothing is left to do
    assert "compiling" not in capsys.readouterr().out


def test_bad_input_is_one_line_and_exit_code_2(
    tuning: Tuning, statements: Path, tmp_path: Path, capsys
):
    (tmp_path / "bad.jsonl").write_text('{"prompt": 3}')
    os.mkfifo(tmp_path / "pipe")  # to read it would be to wait for who writes to it
    out = tmp_path / "out"
    at = ("--statements", statements, "--out", out, "--checkpoint", tuning.model)
    by = (*at, "--verifier", "exact")
    for args, said in (
        (at, "--verifier is missing; allowed: one or more, such as proof"),
        ((*by, "--verifier", "exct"), "--verifier is 'exct'; allowed: exact, boxed, proof, "),
        ((*by, "--verifier", "proof"), "--verifier proof: '0' is no formula"),
        ((*by, "--verifier-seconds", 0), "--verifier-seconds is 0.0; allowed: above 0"),
        ((*by, "--rounds", 0), "--rounds is 0; allowed: 1 to 999"),
        ((*by, "--attempts", 0), "--attempts is 0; allowed: 1 to"),
        ((*by, "--temperature", 0), "--attempts is 8; allowed: 1, since all are the same"),
        ((*by, "--keep", 0), "--keep is 0; allowed: 1 or more"),
        ((*by, "--seed", -1), "--seed is -1; allowed: 0 to"),
        ((*by, "--ask", "some"), "--ask"),
        ((*by, "--checkpoint", tmp_path / "gone"), "--checkpoint "),
        ((*by, "--statements", tmp_path / "gone"), "No such file"),
        ((*by, "--statements", tmp_path / "bad.jsonl"), "bad.jsonl line 1: prompt is 3; allowed: "),
        ((*by, "--held-out", statements), "is held out and stands"),
        ((*by, "--samples", tmp_path / "bad.jsonl"), "bad.jsonl"),
        ((*by, "--chat-template", tmp_path / "pipe"), "not a plain file"),
        ((*by, "--chat-template", tmp_path / "gone"), "No such file"),
        ((*by, "--out", statements), "is a file; allowed: a new or an empty folder"),
        ((*by, "--out", tmp_path), "holds bad.jsonl; allowed: a new or an empty folder"),
        ((*by, "--", "--epoch", "3"), "--epoch"),
        ((*by, "--", "--epochs", "0"), "--epochs is 0; allowed: 1 or more"),
        ((*by, "--", "--data.source", "x"), "--data.source behind --: this command gives it"),
        ((*by, "--", "--launch.processes", "2"), "--launch.processes behind --: this command"),
        ((*by, "--", "--data.format", "text"), "data.format is text; allowed for"),
    ):
        line = mistake_of(main, [*map(str, args)], capsys)
        assert said in line
        assert not out.exists()


def test_help_loads_no_jax():
    shown, loaded = help_of("dsv3_jax.expert_iteration")
    assert loaded.isdisjoint({"jax", "jaxlib", "numpy", "tokenizers", "safetensors", "jinja2"})
    options = "statements out checkpoint verifier verifier-seconds held-out samples rounds attempts"
    options += " ask tune-from kind templates decontaminate dtype chat-template seed temperature"
    options += " top-p max-tokens stop keep near-duplicates near-ngram contamination-ngram rows"
    for name in options.split():
        assert f"--{name} " in shown
