"""The loop: what is attempted, kept and learned, and that no kill loses or doubles any of it."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax.posttrain import (
    expert_iteration,
    iteration_folder,
    iteration_report,
)
from dsv3_jax.posttrain.completions import Ask, Completion
from dsv3_jax.posttrain.iteration_options import Keeping
from dsv3_jax.posttrain.journal import Journal
from tests.posttrain.iterations import (
    PROOFS,
    STATEMENTS,
    Workshop,
    grows,
    plan_of,
    proof,
    statements_of,
    timeless,
)
from tests.posttrain.scripted_models import write_lines

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iteration_report, "draw_rates", lambda rounds, path: None)


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(plan_of(tmp_path), tmp_path / "out")


def grown(model: str, ask: Ask) -> Completion:
    """What `grows` says of any model, as if it were fine-tuned."""
    return grows("tuned", ask)


# --- rounds --------------------------------------------------------------------------------------


def test_a_round_learns_from_what_was_verified_and_the_next_one_knows_more(workshop: Workshop):
    assert workshop.run() == 0
    one, two = workshop.report["rounds"][1:]
    assert (one["accepted"], one["attempts"], one["new samples"], one["samples"]) == (1, 10, 1, 1)
    assert one["tuned"] is False  # of one statement nothing can be held out
    assert two["accepted"] == 1
    assert two["model"] == {"model": "base", "step": 7}
    assert two["samples"] == 2
    assert not workshop.tuned
    assert len(workshop.asked) == 4 + 10 + 10


def test_samples_of_two_statements_make_a_model_that_makes_the_next_attempts(tmp_path: Path):
    def says(model: str, ask: Ask) -> Completion:
        return grows("tuned" if ask.problem.id == "a" else model, ask)

    workshop = Workshop(plan_of(tmp_path), tmp_path / "out", says, tuning=("--epochs", "3"))
    assert workshop.run() == 0
    none, one, two = workshop.report["rounds"]
    assert none["held out"]["accepted"] == 0
    assert one["tuned"]
    assert one["pass"] == {"1": 1.5 / 4, "2": 2 / 4}  # a, b, c (or not c), d
    assert one["held out"]["pass"] == {"1": 0.5, "2": 0.5}
    assert two["model"] == {"model": "round-001", "step": 7}
    assert two["pass"] == {"1": 3 / 4, "2": 3 / 4}
    assert (two["proved"], two["refuted"], two["both"], two["cumulative"]) == (2, 1, 0, 3 / 4)
    base, out = tmp_path / "base", workshop.out
    assert workshop.tuned == [
        [
            *("--init-from", str(base), "--data.source", str(out / f"round-00{n}" / "data.jsonl")),
            *("--output.folder", str(out / f"round-00{n}"), "--output.name", "model"),
            *("--epochs", "3"),
        ]
        for n in (1, 2)
    ]
    assert "round 2: 6 of 10 attempts accepted; pass@1 75.0%" in workshop.said[-1]


def test_the_last_model_is_fine_tuned_on_demand(tmp_path: Path):
    plan = plan_of(tmp_path, tune_from="last", rounds=3)
    workshop = Workshop(plan, tmp_path / "out", grown)
    workshop.run()
    found = [words[1] for words in workshop.tuned]
    runs = [str(workshop.out / f"round-00{n}" / "model-001") for n in (1, 2)]
    assert found == [str(tmp_path / "base"), *runs]


def test_samples_tell_where_they_come_from(workshop: Workshop):
    workshop.says = grown
    workshop.run()
    entries = {
        (e["id"], e["candidate"]): e
        for n in (1, 2)
        for e in workshop.lines(f"round-00{n}/candidates.jsonl")
    }
    samples = workshop.lines("samples.jsonl")
    assert len(samples) == 6
    for sample in samples:
        told = sample["provenance"]
        entry = entries[told["prompt"]["id"], told["candidate"]]
        assert sample["messages"][-1] == {"role": "assistant", "content": entry["text"]}
        assert told["verifier"] == "proof"
        assert told["verdict"] == "accepted"
        assert told["sampling"]["seed"] == entry["seed"]
        assert told["round"] == 1 + told["candidate"] // 2
        assert told["model"] == ("base" if told["round"] == 1 else "round-001")
        assert sample["verification"] == {
            "by": "rule",
            "verdict": "accepted",
            "note": "1 steps",
        } or (told["round"] == 2)
    assert len({entry["seed"] for entry in entries.values()}) == len(entries)


def test_the_data_set_grows_without_duplicates_and_never_changes(tmp_path: Path):
    """Each statement has two proofs in every round, one of them that of the round before."""

    def says(model: str, ask: Ask) -> Completion:
        return Completion(proof(ask, (ask.number + 1) // 2), tokens=1)

    examples = write_lines(
        tmp_path / "e.jsonl",
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
        {
            "messages": [
                {"role": "user", "content": f"{STATEMENTS['b']}?"},
                {"role": "assistant", "content": PROOFS["b"].upper()},
            ]
        },
    )
    plan = plan_of(tmp_path, rounds=3, samples=examples, keeping=Keeping(keep=3))
    workshop = Workshop(plan, tmp_path / "out", says)
    workshop.run()
    kept = [
        (s["provenance"]["prompt"]["id"], s["messages"][-1]["content"])
        for s in workshop.lines("samples.jsonl")
    ]
    assert len(set(kept)) == len(kept)
    assert sorted(i for i, _ in kept) == ["a"] * 3 + ["b"] * 3 + ["not c"] * 3
    assert ("b", PROOFS["b"]) not in kept  # --samples has it
    rounds = [workshop.lines(f"round-00{n}/samples.jsonl") for n in (1, 2, 3)]
    assert [len(new) for new in rounds] == [5, 3, 1]
    assert [*itertools.chain(*rounds)] == workshop.lines("samples.jsonl")
    texts = examples.read_text()
    for n in (1, 2, 3):
        file = workshop.out / f"round-00{n}" / "data.jsonl"
        assert file.read_text().startswith(texts)
        assert workshop.lines(f"round-00{n}/data.jsonl")[2:] == [*itertools.chain(*rounds[:n])]
        texts = file.read_text()
    fates = workshop.report["rounds"][1]["fates"]
    assert fates == {"rejected": 4, "duplicate": 1, "kept": 5}


def test_what_was_settled_is_not_attempted_again(tmp_path: Path):
    """Of a statement and its negation the other one; with `unsettled` both."""
    asked = {}
    for ask in ("all", "unsettled"):
        plan = plan_of(tmp_path, ask=ask)
        workshop = Workshop(plan, tmp_path / ask, lambda model, ask: grows("tuned", ask))
        workshop.run()
        asked[ask] = {i for model, i, _ in workshop.asked if model == "round-001"} - {"h", "i"}
        assert workshop.report["rounds"][2]["cumulative"] == 3 / 4
    assert asked == {"all": {"a", "b", "not c", "d"}, "unsettled": {"d"}}


def test_a_statement_that_is_proved_and_refuted_is_told(tmp_path: Path):
    plan = plan_of(tmp_path, verifiers=["regex:by"], rounds=1)
    workshop = Workshop(plan, tmp_path / "out")
    workshop.run()
    assert workshop.report["rounds"][1]["both"] == 1
    assert "1 statements are proved and refuted: a verifier is wrong" in workshop.said[-1]


def test_without_anything_accepted_the_model_stays_and_tries_anew(workshop: Workshop):
    workshop.says = lambda model, ask: Completion("no proof")
    assert workshop.run() == 0
    assert {model for model, _, _ in workshop.asked} == {"base"}
    assert len(set(workshop.asked)) == len(workshop.asked) == 4 + 2 * 10
    assert "0 of 10 attempts accepted" in workshop.said[-1]
    assert "not fine-tuned" in workshop.said[-1]
    assert (workshop.out / "samples.jsonl").read_text() == ""
    assert "held out" not in workshop.report["rounds"][2]


def test_more_rounds_go_on_where_fewer_ended(tmp_path: Path):
    whole = Workshop(plan_of(tmp_path, rounds=3), tmp_path / "whole", grown)
    whole.run()
    parts = [Workshop(plan_of(tmp_path, rounds=n), tmp_path / "parts", grown) for n in (1, 3)]
    for part in parts:
        part.run()
    assert timeless(tmp_path / "parts") == timeless(tmp_path / "whole")
    assert parts[0].asked + parts[1].asked == whole.asked


def test_another_configuration_in_the_same_folder_is_refused(tmp_path: Path):
    Workshop(plan_of(tmp_path), tmp_path / "out").run()
    for changes, said in (
        ({"attempts": 3}, "was begun with another --attempts: 2, now 3; allowed: the same"),
        ({"keeping": Keeping(keep=9)}, "another --keep: 4, now 9"),
        ({"statements": statements_of(tmp_path, {"a": "p |- p"}, "t.jsonl")}, "--statements"),
        ({"more": {"--": ["--epochs", "2"]}}, "another --: None, now"),
    ):
        with pytest.raises(ValueError, match=said):
            Workshop(plan_of(tmp_path, **changes), tmp_path / "out").run()


# --- kills ---------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: no `except Exception` stops it."""


class Stop:
    """Counts what the loop changes on the disk, and ends it at the change numbered `at`, before it
    or just after it; nothing is changed any more then.
    """

    def __init__(self, patch: pytest.MonkeyPatch, at: int, is_after: bool) -> None:
        self.at, self.is_after, self.count = at, is_after, 0
        for module in (expert_iteration, iteration_folder, iteration_report):
            patch.setattr(module, "replace_file", self.watch(module.replace_file))
        patch.setattr(Journal, "add", self.watch(Journal.add))
        patch.setattr(Workshop, "tune", self.watch(Workshop.tune))
        patch.setattr(Path, "mkdir", self.watch(Path.mkdir))

    def watch(self, real):
        def watched(*args, **kwargs):
            place, self.count = self.count, self.count + 1
            if place > self.at or (place == self.at and not self.is_after):
                raise Killed
            found = real(*args, **kwargs)
            if place == self.at:
                raise Killed
            return found

        return watched


@pytest.mark.parametrize(
    ("is_after", "stride"),
    [
        (False, 4),
        pytest.param(False, 1, marks=pytest.mark.slow),
        pytest.param(True, 1, marks=pytest.mark.slow),
    ],
)
def test_a_kill_between_any_two_changes_loses_nothing_and_doubles_nothing(
    tmp_path: Path, is_after: bool, stride: int
):
    plan = plan_of(tmp_path)
    whole = Workshop(plan, tmp_path / "whole", grown)
    whole.run()
    wanted = timeless(whole.out)
    for at in itertools.count(0, stride):
        workshop = Workshop(plan, tmp_path / f"at{at:03d}", grown)
        with pytest.MonkeyPatch.context() as patch:
            stop = Stop(patch, at, is_after)
            with contextlib.suppress(Killed):
                workshop.run()
            if stop.count <= at:
                break
        before = len(workshop.asked)
        known = sum(len(workshop.lines(f)) for f in _journals(workshop.out))
        assert workshop.run() == 0
        assert timeless(workshop.out) == wanted, at
        assert before - known in (0, 1)  # one may have been asked and not yet written
        assert len(workshop.asked) - before == len(whole.asked) - known
    assert at > 45


def _journals(out: Path) -> list[Path]:
    files = [*out.glob("round-*/candidates.jsonl"), *out.glob("round-*/held_out.jsonl")]
    return [file.relative_to(out) for file in files]


_SCRIPT = """
import os, signal, sys
from pathlib import Path
from dsv3_jax.posttrain import iteration_report
from dsv3_jax.posttrain.journal import Journal
from tests.posttrain.iterations import Workshop, grows, plan_of
iteration_report.draw_rates = lambda rounds, path: None
folder, at = Path(sys.argv[1]), int(sys.argv[2])
count = 0
def watch(owner, name):
    real = getattr(owner, name)
    def watched(*args):
        global count
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return real(*args)
    setattr(owner, name, watched)
watch(Journal, "add")
watch(Workshop, "tune")
Workshop(plan_of(folder), folder / "out", lambda model, ask: grows("tuned", ask)).run()
"""


def test_a_process_that_is_killed_again_and_again_goes_on(tmp_path: Path):
    """In the held-out statements, in the attempts, before the fine-tuning of round 1, in round 2;
    the journal's last line is torn each time.
    """
    whole = Workshop(plan_of(tmp_path), tmp_path / "whole", lambda m, ask: grows("tuned", ask))
    whole.run()
    out = tmp_path / "out"
    for at in (2, 7, 5, 6):
        command = [sys.executable, "-c", _SCRIPT, str(tmp_path), str(at)]
        ended = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert ended.returncode == -signal.SIGKILL
        newest = max((out / f for f in _journals(out)), key=lambda f: f.stat().st_mtime_ns)
        with newest.open("a") as file:
            file.write('{"id": "a", "cand')
    workshop = Workshop(plan_of(tmp_path), out, lambda model, ask: grows("tuned", ask))
    assert workshop.run() == 0
    assert timeless(out) == timeless(whole.out)
    assert any("a torn last line was cut off" in line for line in workshop.said)


def test_a_fine_tuning_that_ends_early_is_resumed(workshop: Workshop):
    workshop.says = grown
    workshop.code = 143
    assert workshop.run() == 143
    assert not (workshop.out / "round-002").exists()
    asked = len(workshop.asked)
    workshop.code = 0
    assert workshop.run() == 0
    run = workshop.out / "round-001" / "model-001"
    assert workshop.tuned[1] == ["--resume", str(run)]
    assert len(workshop.asked) == len(set(workshop.asked)) > asked


def test_a_run_that_was_never_begun_is_left_aside(workshop: Workshop):
    """Of a kill before its configuration was written: sft makes another folder then."""
    workshop.says = grown
    (workshop.out / "round-001" / "model-000").mkdir(parents=True)
    (workshop.out / "settings.json").write_text(
        json.dumps({"expert iteration": dict(workshop.plan.settings)})
    )
    assert workshop.run() == 0
    assert workshop.tuned[0][0] == "--init-from"
