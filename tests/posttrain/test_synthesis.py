"""The whole without a model: what is asked and what comes of it, in whatever order; and a run that
stops anywhere goes on to the same samples, each candidate asked for once.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.posttrain import synthesis_report
from dsv3_jax.posttrain.completions import Ask, Completion, Failure, Unavailable
from dsv3_jax.posttrain.journal import Journal
from dsv3_jax.posttrain.synthesis import Inputs, read_work, synthesise
from dsv3_jax.posttrain.synthesis_folder import synthesis_folder
from dsv3_jax.posttrain.synthesis_options import Sampling, Selection
from tests.posttrain.scripted_models import ScriptedModel, write_lines

LINES = (
    {"prompt": "1 + 1?", "reference": "2", "kind": "reasoning", "id": "a"},
    {"prompt": "2 + 2?", "reference": "4", "response": "\\boxed{4}", "kind": "reasoning_original"},
    {"prompt": "write", "kind": "writing"},
)


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a second each time, and has a test of its own."""
    monkeypatch.setattr(synthesis_report, "draw_lengths", lambda stages, path: None)


def says(ask: Ask) -> Completion | Failure:
    """Wrong now and then, cut now and then, a failure once; a function of problem and seed."""
    if ask.problem.kind == "writing":
        return Failure("too long") if ask.number == 1 else Completion(f"poem {ask.seed}", tokens=2)
    right = ask.seed % 3 > 0
    text = f"seed {ask.seed}: \\boxed{{{ask.problem.reference if right else 'x'}}}"
    return Completion(text, f"hm {ask.seed}", cut=ask.seed % 7 == 0, tokens=5)


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return Inputs(
        write_lines(tmp_path / "prompts.jsonl", *LINES),
        verifiers=("reasoning_original=boxed", "reasoning_reflective=boxed"),
        candidates=6,
        selection=Selection(keep=3),
    )


def synthesised(
    inputs: Inputs, out: Path, model: Any = None, *, reselect: bool = False
) -> dict[str, Any]:
    model = model or ScriptedModel(says)
    with synthesis_folder(out) as folder:
        return synthesise(
            read_work(inputs),
            folder,
            lambda step: model,
            lambda total: contextlib.nullcontext(lambda entry: None),
            reselect,
        )


def samples(out: Path) -> list[dict[str, Any]]:
    """Without the times at which they came."""
    found = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    for one in found:
        del one["provenance"]["time"]
    return found


def entries(out: Path) -> list[tuple]:
    lines = (out / "candidates.jsonl").read_text().splitlines()
    return [tuple(json.loads(line)[n] for n in ("id", "kind", "candidate")) for line in lines]


def test_samples_are_what_the_verifiers_accept_at_most_keep_a_problem(inputs, tmp_path):
    found = synthesised(inputs, tmp_path / "out")
    assert found["candidates"] == 6 + 6 + 1 + 6
    made = samples(tmp_path / "out")
    counts = Counter((one["provenance"]["prompt"]["id"], one["kind"]) for one in made)
    assert [*counts] == [
        ("a", "reasoning_original"),
        ("a", "reasoning_reflective"),
        ("2", "reasoning_original"),
        ("3", "writing"),
    ]
    assert max(counts.values()) == 3
    for one in made:
        answer, said = one["messages"][-1]["content"], one["verification"]
        if one["kind"] == "writing":
            assert said == {"by": "none", "verdict": None, "note": ""}
            continue
        assert said["by"] == "rule"
        assert said["verdict"] == "accepted"
        assert said["note"] in answer
        assert answer.startswith("<think>\nhm ") == (one["kind"] == "reasoning_reflective")
        assert (one["messages"][0]["role"] == "system") == (one["kind"] == "reasoning_reflective")
    given = [one for one in made if "2 + 2?" in one["messages"][-2]["content"]]
    assert [one["provenance"]["model"] for one in given] == [None]
    assert found["fates"]["kept"] == len(made)
    assert found["failures"] == {"too long": 1}


def test_the_order_in_which_answers_come_changes_nothing(inputs, tmp_path):
    synthesised(inputs, tmp_path / "one")
    synthesised(inputs, tmp_path / "two", ScriptedModel(says, backwards=True))
    assert samples(tmp_path / "one") == samples(tmp_path / "two")
    assert entries(tmp_path / "one") != entries(tmp_path / "two")


def test_seeds_differ_by_problem_candidate_and_command(inputs, tmp_path):
    one, two = ScriptedModel(says), ScriptedModel(says)
    synthesised(inputs, tmp_path / "one", one)
    synthesised(replace(inputs, seed=1), tmp_path / "two", two)
    seeds = [ask.seed for model in (one, two) for ask in model.asked]
    assert len(set(seeds)) == len(seeds) == 36
    assert all(0 <= seed < 2**32 for seed in seeds)


class Killed(BaseException):
    """Stands for a signal."""


@pytest.mark.parametrize("backwards", [False, True])
def test_a_run_stopped_after_any_answer_goes_on_to_the_same_samples(inputs, tmp_path, backwards):
    synthesised(inputs, tmp_path / "whole")
    wanted = samples(tmp_path / "whole")
    for after in range(0, 19, 3):
        out, count = tmp_path / f"out{after}", 0

        def dies(ask: Ask, after=after) -> Completion | Failure:
            nonlocal count
            if count == after:
                raise Killed
            count += 1
            return says(ask)

        with contextlib.suppress(Killed):
            synthesised(inputs, out, ScriptedModel(dies, backwards=backwards))
        model = ScriptedModel(says)
        synthesised(inputs, out, model)
        assert samples(out) == wanted
        assert len(entries(out)) == len(set(entries(out))) == 19
        assert len(model.asked) == 18 - after  # none that was answered is asked again


def test_a_run_stopped_while_it_writes_goes_on(inputs, tmp_path, monkeypatch):
    synthesised(inputs, tmp_path / "whole")
    lines = (tmp_path / "whole" / "candidates.jsonl").read_bytes()
    for end in (10, len(lines) // 2, len(lines) - 1):
        out = tmp_path / f"out{end}"
        synthesised(inputs, out)
        (out / "candidates.jsonl").write_bytes(lines[:end])
        for name in ("samples.jsonl", "report.md"):
            (out / name).unlink()
        synthesised(inputs, out)
        assert samples(out) == samples(tmp_path / "whole")
        assert len(entries(out)) == len(set(entries(out))) == 19


def test_a_finished_run_asks_nothing_and_opens_no_model(inputs, tmp_path):
    synthesised(inputs, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    work = read_work(inputs)
    with synthesis_folder(tmp_path / "out") as folder:

        def open_source(step: int | None) -> Any:
            raise AssertionError("nothing is to be asked")

        synthesise(work, folder, open_source, lambda total: contextlib.nullcontext(print))
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    del before["settings.json"], after["settings.json"]  # knows two states of the samples now
    assert after == before


def test_a_source_that_ends_leaves_what_it_gave(inputs, tmp_path):
    def ends(ask: Ask) -> Completion | Failure:
        if ask.problem.kind == "writing":
            raise Unavailable("--server gone")
        return says(ask)

    with pytest.raises(Unavailable):
        synthesised(inputs, tmp_path / "out", ScriptedModel(ends))
    assert len(entries(tmp_path / "out")) == 13
    model = ScriptedModel(says)
    synthesised(inputs, tmp_path / "out", model)
    assert len(model.asked) == 6


@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_gets_no_answer_at_all_leaves_the_folder_as_it_was(inputs, tmp_path, there):
    def ends(ask: Ask) -> Completion | Failure:
        raise Unavailable("--server gone")

    asking = replace(inputs, prompts=write_lines(tmp_path / "p.jsonl", LINES[0]))
    out = tmp_path / "out"
    if there:
        out.mkdir()
    with pytest.raises(Unavailable):
        synthesised(asking, out, ScriptedModel(ends))
    assert out.exists() == there
    assert not there or not list(out.iterdir())


def test_the_step_that_was_begun_with_is_kept(inputs, tmp_path):
    wanted = []

    def once(step: int | None, *, fails: bool) -> ScriptedModel:
        wanted.append(step)
        limit = iter(range(3 if fails else 99))

        def answer(ask: Ask) -> Completion | Failure:
            if next(limit, None) is None:
                raise Unavailable("gone")
            return says(ask)

        return ScriptedModel(answer, {"model": "m", "step": 5})

    for fails in (True, False):
        with synthesis_folder(tmp_path / "out") as folder, contextlib.suppress(Unavailable):
            synthesise(
                read_work(inputs),
                folder,
                lambda step, fails=fails: once(step, fails=fails),
                lambda total: contextlib.nullcontext(lambda entry: None),
            )
    assert wanted == [None, 5]
    other = replace(inputs, model={"--step": 6})
    with pytest.raises(ValueError, match="was begun with another --step: 5, now 6"):
        synthesised(other, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda inputs: replace(inputs, candidates=5), "--candidates: 6, now 5"),
        (lambda inputs: replace(inputs, seed=1), "--seed: 0, now 1"),
        (lambda inputs: replace(inputs, sampling=Sampling(top_p=0.5)), "--top-p: 1.0, now 0.5"),
        (lambda inputs: replace(inputs, verifiers=()), "--verifier: ['reasoning_original=boxed'"),
        (lambda inputs: replace(inputs, values={"name": "a"}), "--value: {}, now {'name': 'a'}"),
        (lambda inputs: replace(inputs, model={"--model": "b"}), "--model: None, now 'b'"),
        (lambda inputs: replace(inputs, selection=Selection(keep=2)), "--keep: 3, now 2"),
    ],
)
def test_another_configuration_is_refused_by_name(
    inputs: Inputs, tmp_path: Path, change: Callable[[Inputs], Inputs], name: str
):
    synthesised(inputs, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match=r"--out .* was begun with another ") as refused:
        synthesised(change(inputs), tmp_path / "out")
    assert name in str(refused.value)
    assert ("--reselect" in str(refused.value)) == ("--keep" in name)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_other_prompts_and_templates_are_refused_by_name(inputs, tmp_path):
    synthesised(inputs, tmp_path / "out")
    own = tmp_path / "own.json"
    own.write_text('{"writing": {"user": "write: {{ prompt }}"}}')
    with pytest.raises(ValueError, match="with another --templates"):
        synthesised(replace(inputs, templates=own), tmp_path / "out")
    write_lines(inputs.prompts, *LINES[:2])
    with pytest.raises(ValueError, match="with another --prompts"):
        synthesised(inputs, tmp_path / "out")


def test_samples_are_selected_anew_without_a_question(inputs, tmp_path):
    out = tmp_path / "out"
    synthesised(inputs, out)
    before = samples(out)
    fewer = replace(inputs, selection=Selection(keep=1))
    model = ScriptedModel(says)
    synthesised(fewer, out, model, reselect=True)
    assert not model.asked
    assert len(samples(out)) == 4 < len(before)
    synthesised(fewer, out)  # the settings of now are those that count
    with pytest.raises(ValueError, match="another --seed"):
        synthesised(replace(fewer, seed=3), out, reselect=True)


def test_a_persons_verdicts_are_heeded_and_never_overwritten(inputs, tmp_path):
    out = tmp_path / "out"
    synthesised(inputs, out)
    made = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    made[0]["verification"] = {"by": "human", "verdict": "rejected", "note": "no"}
    made[1]["verification"] = {"by": "human", "verdict": "accepted", "note": "yes"}
    write_lines(out / "samples.jsonl", *made)
    with pytest.raises(
        ValueError, match=r"samples.jsonl was changed since it was written; .*--rev"
    ):
        synthesised(inputs, out)
    (out / "samples.jsonl").rename(tmp_path / "reviewed.jsonl")
    reviewed = replace(inputs, reviewed=tmp_path / "reviewed.jsonl")
    found = synthesised(reviewed, out, reselect=True)
    assert found["fates"]["rejected by a person"] == 1
    answers = [one["messages"] for one in samples(out)]
    assert made[0]["messages"] not in answers
    place = answers.index(made[1]["messages"])
    assert samples(out)[place]["verification"] == made[1]["verification"]


def test_problems_of_an_examination_are_not_asked_and_answers_that_show_it_go(inputs, tmp_path):
    exam = write_lines(tmp_path / "exam.jsonl", {"question": "Write!", "answer": "so"})
    shown = write_lines(tmp_path / "more.jsonl", {"text": "a poem of five whole words"})

    def tells(ask: Ask) -> Completion | Failure:
        text = "A poem: of five, whole words" if ask.number == 0 else f"other {ask.seed}"
        return Completion(text)

    lines = write_lines(
        tmp_path / "w.jsonl",
        {"prompt": "write", "kind": "writing"},
        {"prompt": "go", "kind": "writing"},
    )
    asking = Inputs(
        lines,
        decontaminate=(exam, shown),
        candidates=2,
        selection=Selection(keep=2, contamination_ngram=5),
    )
    model = ScriptedModel(tells)
    found = synthesised(asking, tmp_path / "out", model)
    assert {ask.problem.prompt for ask in model.asked} == {"go"}
    fates = [
        json.loads(line) for line in (tmp_path / "out" / "fates.jsonl").read_text().splitlines()
    ]
    assert [tuple(line.values()) for line in fates] == [
        ("1", "writing", None, "contaminated", f"{exam} line 1"),
        ("2", "writing", 0, "contaminated", f"{shown} line 1"),
        ("2", "writing", 1, "kept", None),
    ]
    assert (found["problems"], found["problems contaminated"]) == (2, 1)
    assert found["fates"] == dict.fromkeys(found["fates"], 0) | {"contaminated": 1, "kept": 1}


def test_a_run_that_has_nothing_to_ask_is_a_whole_run(inputs, tmp_path):
    exam = write_lines(tmp_path / "exam.jsonl", {"question": "Write!"})
    lines = write_lines(tmp_path / "w.jsonl", {"prompt": "write", "kind": "writing"})
    asking, out = replace(inputs, prompts=lines, decontaminate=(exam,)), tmp_path / "out"
    for _ in range(2):
        assert synthesised(asking, out)["problems contaminated"] == 1
        assert (out / "samples.jsonl").read_bytes() == b""
    with pytest.raises(ValueError, match="was begun with another --seed"):
        synthesised(replace(asking, seed=1), out)
    assert synthesised(replace(asking, decontaminate=()), out, reselect=True)["candidates"] == 6


def test_folders_of_something_else_are_refused(inputs, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").touch()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "settings.json").write_text("{}")
    for out, said in (
        (inputs.prompts, "is a file; allowed: a new or an empty folder"),
        (tmp_path / "other", "holds x; allowed: a new or an empty folder"),
        (tmp_path / "bad", "settings.json: no settings of this command"),
    ):
        with pytest.raises(ValueError, match=said):
            synthesised(inputs, out)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["x"]


def test_a_torn_line_is_told_of(inputs, tmp_path, capsys):
    out = tmp_path / "out"
    synthesised(inputs, out)
    with (out / "candidates.jsonl").open("ab") as file:
        file.write(b'{"id": "a"')
    synthesised(inputs, out)
    assert capsys.readouterr().err.endswith("candidates.jsonl: a torn last line was cut off\n")
    journal = Journal(out / "candidates.jsonl")
    assert not journal.torn
    journal.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [("text", 5), ("verification", {"by": "rule"}), ("source", {}), ("seed", None)],
)
def test_a_journal_that_was_changed_is_told_before_anything_is_asked(
    inputs: Inputs, tmp_path: Path, name: str, value: Any
):
    out = tmp_path / "out"
    synthesised(inputs, out)
    journal = out / "candidates.jsonl"
    entries = [json.loads(line) for line in journal.read_text().splitlines()[:-1]]
    place = next(place for place, entry in enumerate(entries) if "text" in entry)
    entries[place][name] = value
    write_lines(journal, *entries)
    model = ScriptedModel(says)
    with pytest.raises(ValueError, match=r"candidates\.jsonl: candidate \d of '.*' was changed"):
        synthesised(inputs, out, model)
    assert not model.asked
