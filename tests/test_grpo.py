"""`python -m dsv3_jax.grpo`: a model rewarded for its own answers from end to end, exactly resumed;
rewards that fail; what a user may get wrong.
"""

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.checkpoint import store
from dsv3_jax.config.grpo import GrpoConfig, load_grpo
from dsv3_jax.grpo import COMMAND, main, resolved, rewards_of
from dsv3_jax.posttrain import code_runner, grpo_feed
from dsv3_jax.posttrain.grpo_feed import GrpoFeed
from dsv3_jax.train import command
from dsv3_jax.train.__main__ import main as train
from tests.commands import help_of
from tests.reinforcing import FLAGS, REWARDS, Reinforcing, told, without_pictures
from tests.runs import send_at_step
from tests.tuning import assert_same_arrays, entries_of


@pytest.fixture(scope="module")
def reinforcing(tmp_path_factory: pytest.TempPathFactory) -> Reinforcing:
    made = Reinforcing(tmp_path_factory.mktemp("grpo"))
    made.make()
    return made


@pytest.fixture(scope="module")
def ran(reinforcing: Reinforcing) -> Path:
    """A whole run: two batches of two groups of three, two updates on each."""
    with without_pictures():
        assert reinforcing.begin(reinforcing.home / "runs") == 0
    return reinforcing.home / "runs" / "grpo-001"


# --- a run ---------------------------------------------------------------------------------------


def test_a_run_tells_of_rewards_and_policies(ran: Path):
    train = entries_of(ran, "train")
    inner = [entry["grpo"] for entry in train]
    assert [(one["batch"], one["update"]) for one in inner] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for entry, one in zip(train, inner, strict=True):
        early, length = one["parts"].values()
        assert entry["reward"] == pytest.approx(early + 0.25 * length)
        assert entry["kl"] >= 0
        assert 0 < one["length"] <= 6
    assert inner[0]["ratio"] == inner[2]["ratio"] == 1
    assert inner[1]["ratio"] != 1
    assert train[0]["kl"] == 0  # the reference is what the run began with
    assert train[2]["kl"] > 0
    assert train[0]["reward"] == train[1]["reward"] != train[2]["reward"]
    result = json.loads((ran / "result.json").read_text())
    assert result["reward_end"] == pytest.approx(np.mean([e["reward"] for e in train[-2:]]))


def test_rollout_and_training_agree_on_log_probabilities_within_1e_4(ran: Path):
    """In float32, of every token."""
    for entry in entries_of(ran, "train"):
        assert 0 < entry["grpo"]["drift_most"] < 1e-4
        assert entry["grpo"]["left_out"] == 0


@pytest.mark.slow
def test_a_run_leaves_a_page_with_its_rewards(reinforcing: Reinforcing, ran: Path):
    """Drawn again where a finished run is resumed."""
    before = (ran / "metrics.jsonl").read_bytes()
    assert reinforcing.run("--resume", ran, pictures=True) == 0
    page = (ran / "report.html").read_text()
    assert "Finished: all 4 steps" in page
    for title in ("Rewards", "The mean reward went from", "Engine to training, nats per token"):
        assert title in page
    assert "Loss, nats per token" not in page
    assert (ran / "curves.png").stat().st_size > 1000
    assert (ran / "metrics.jsonl").read_bytes() == before


def test_answers_are_left_with_rewards_and_reasons(ran: Path):
    lines = (ran / "answers" / "step_00000001.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert len(found) == 6
    assert sum(one["advantage"] for one in found[:3]) == pytest.approx(0)
    assert {one["prompt"] for one in found[:3]} != {one["prompt"] for one in found[3:]}
    assert found[0]["parts"]["python:tests.own_rewards:early"]["reason"] == "early characters"


def test_a_run_stopped_between_updates_on_a_batch_goes_on_bit_for_bit(
    reinforcing: Reinforcing, ran: Path, tmp_path: Path
):
    with pytest.MonkeyPatch.context() as patch:
        look, looks = GrpoFeed._look, []

        def stopping(feed: GrpoFeed, *args: np.ndarray) -> None:
            looks.append(1)
            if len(looks) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            look(feed, *args)

        patch.setattr(GrpoFeed, "_look", stopping)
        begin_and_stop(reinforcing, tmp_path, after=3)
    resume(reinforcing, tmp_path)
    assert_same_run(tmp_path / "grpo-001", ran)


@pytest.mark.slow
def test_a_run_stopped_while_answers_are_drawn_goes_on_bit_for_bit(
    reinforcing: Reinforcing, ran: Path, tmp_path: Path
):
    """At once: they are drawn anew."""
    with pytest.MonkeyPatch.context() as patch:
        send_at_step(patch, 3, signal.SIGTERM)
        begin_and_stop(reinforcing, tmp_path, after=2)
    resume(reinforcing, tmp_path)
    assert_same_run(tmp_path / "grpo-001", ran)


def begin_and_stop(reinforcing: Reinforcing, folder: Path, after: int) -> None:
    with without_pictures():
        assert reinforcing.begin(folder) == 128 + signal.SIGTERM
    run = folder / "grpo-001"
    assert len(entries_of(run, "train")) == store.steps(run / "checkpoints")[-1] == after


def resume(reinforcing: Reinforcing, folder: Path) -> None:
    with without_pictures():
        assert reinforcing.run("--resume", folder / "grpo-001") == 0


def assert_same_run(run: Path, other: Path) -> None:
    assert [e for e in told(run) if e["kind"] == "train"] == [
        e for e in told(other) if e["kind"] == "train"
    ]
    assert_same_arrays(run, other, store.steps(other / "checkpoints")[-1])


# --- rewards and policies that go wrong ----------------------------------------------------------


@pytest.mark.slow
def test_failing_rewards_count_as_chosen_and_the_run_goes_on(
    reinforcing: Reinforcing, tmp_path: Path
):
    """One that raises, hangs, returns NaN or a value, beside one that works."""
    rewards = ("--reward", "python:tests.own_rewards:trouble", *REWARDS[:2])
    more = ("--reward-failed", -1, "--reward-seconds", 0.5, "--train.steps", 2)
    with without_pictures():
        assert reinforcing.begin(tmp_path, *more, rewards=rewards) == 0
    train = entries_of(tmp_path / "grpo-001", "train")
    assert 0 < train[0]["grpo"]["failed"] < 1
    assert np.isfinite([entry["reward"] for entry in train]).all()
    lines = (tmp_path / "grpo-001" / "answers" / "step_00000001.jsonl").read_text().splitlines()
    parts = [json.loads(line)["parts"]["python:tests.own_rewards:trouble"] for line in lines]
    assert all(part["value"] == -1 for part in parts if part["failed"])


def test_equal_rewards_are_no_reason_to_learn(
    reinforcing: Reinforcing, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """With a beta of 0 no label has a weight; nothing is NaN. Prompts too long are counted."""
    rewards = ("--reward", "python:tests.own_rewards:equal")
    with without_pictures():
        assert reinforcing.begin(tmp_path, "--kl", 0, "--train.steps", 1, rewards=rewards) == 0
    assert "4 prompts of up to 5 tokens" in (said := capsys.readouterr().out)
    assert "1 dropped, longer than 27 tokens" in said
    (entry,) = entries_of(tmp_path / "grpo-001", "train")
    assert (entry["grpo"]["equal_groups"], entry["main_loss"], entry["skipped"]) == (1, 0, 0)


@pytest.mark.parametrize(
    ("rewards", "more", "line"),
    [
        (
            ("--reward", "python:tests.own_rewards:nan"),
            (),
            "all 6 rewards of step 1 failed: the re",
        ),
        pytest.param(
            REWARDS,
            ("--max-difference", "1e-12"),
            "answers have log-probabilities in the engine",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_that_has_nothing_to_learn_from_ends_with_one_line(
    reinforcing: Reinforcing,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    rewards: tuple,
    more: tuple,
    line: str,
):
    """And keeps what it had."""
    with pytest.raises(SystemExit) as stop, without_pictures():
        reinforcing.begin(tmp_path, *more, rewards=rewards)
    assert stop.value.code == 2
    told = capsys.readouterr().err.splitlines()
    assert line in told[-1]
    assert sum(one.startswith("error: ") for one in told) == 1
    assert store.steps(tmp_path / "grpo-001" / "checkpoints") == [0]


@pytest.mark.parametrize("text", ["", "abcde", "abcdef", "abcdefghijk"])
def test_answers_of_any_length_reach_all_processes(monkeypatch: pytest.MonkeyPatch, text: str):
    """In words; made once."""
    monkeypatch.setattr(grpo_feed, "WORD", 5)
    made = iter([text])
    assert grpo_feed.told_to_all(lambda: next(made)) == text


# --- what a user may get wrong -------------------------------------------------------------------


def test_help_names_the_options_and_loads_no_jax():
    shown, loaded = help_of("dsv3_jax.grpo")
    assert loaded.isdisjoint({"jax", "jaxlib", "flax", "optax", "orbax", "chex", "grain", "numpy"})
    assert {
        *("--prompts", "--reward", "--group", "--clip", "--kl", "--updates", "--max-tokens"),
        *("--temperature", "--unsafe-local-exec", "--init-from", "--resume", "--mesh.pipe"),
    } <= set(re.findall(r"--[a-z][\w.-]*", shown))


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--init-from="], "--init-from is needed"),
        (["--init-from", "nowhere"], "--init-from nowhere: no run there"),
        (["--prompts="], "--prompts is needed"),
        (["--data.source", "x.jsonl"], "--prompts and --data.source: allowed: one of them"),
        (["--reward="], "--reward is missing; allowed: one or more of"),
        (["--reward", "rouge"], "--reward 'rouge'"),
        (["--reward", "boxed*x"], "--reward is 'boxed*x'; allowed: NAME or NAME*WEIGHT"),
        (["--reward", "judge:score"], "--reward 'judge:score': no judge is given"),
        (["--judge-server", "http://x"], "--judge-server and --judge-model go together"),
        (["--judge-principles", "{latin}"], "latin.txt: byte 3 is no UTF-8"),
        (["--judge-principles", "none.txt"], "none.txt"),
        (["--reward-workers", "0"], "--reward-workers is 0; allowed: 1 to 1024"),
        (["--group", "1"], "--group is 1; allowed: 2 or more"),
        (["--temperature", "0"], "--temperature is 0.0; allowed: above 0"),
        (["--temperature", "1e39"], "--temperature is 1e+39; allowed: from 0 to below 1e38"),
        (["--clip", "1"], "--clip is 1.0; allowed: between 0 and 1"),
        (["--max-tokens", "33"], "--max-tokens is 33; allowed: less than 33"),
        (["--max-tokens", "31"], "all 5 prompts are too long, the shortest of 5 tokens; allowed:"),
        (["--train.rows", "1"], "train.rows is 1; allowed: at least 2, for 6 answers"),
        (["--train.spike", "skip"], "train.spike is skip; allowed here: off"),
        (["--data.format", "text"], "data.format is text; allowed here: prompts"),
        (["--prompts", "{p}"], "bad.jsonl line 2: one of prompt and messages is needed"),
        (["--prompts", "none.jsonl"], "none.jsonl"),
        (["--prompts", "~nosuchuser/a"], "data.source ~nosuchuser/a: no home folder is known"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_run_behind(
    reinforcing: Reinforcing,
    tmp_path: Path,
    args: list[str],
    line: str,
    capsys: pytest.CaptureFixture,
):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "1+1"}\n{"question": "1+2"}\n')
    names = {arg.partition("=")[0] for arg in args}
    defaults = {
        "--init-from": reinforcing.model,
        "--prompts": reinforcing.prompts,
        "--reward": "boxed",
    }
    given = [str(x) for name, x in defaults.items() if name not in names for x in (name, x)]
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    files = {"{p}": str(bad), "{latin}": str(tmp_path / "latin.txt")}
    given += [files.get(arg, arg) for arg in args if not arg.endswith("=")]
    with pytest.raises(SystemExit) as stop:
        main([*map(str, FLAGS), "--output.folder", str(tmp_path / "runs"), *given])
    assert stop.value.code == 2
    told = capsys.readouterr().err.splitlines()  # behind the progress of loading the model
    assert [place for place, one in enumerate(told) if one.startswith("error: ")] == [len(told) - 1]
    assert line in told[-1]
    assert not list(tmp_path.glob("runs/*"))


def test_code_is_refused_without_a_box_but_for_the_option(
    reinforcing: Reinforcing, tmp_path: Path, capsys: pytest.CaptureFixture
):
    asked = []

    def find() -> tuple[None, dict[str, str]]:
        asked.append(1)
        return None, {"a box": "none here"}

    given = ["--init-from", reinforcing.model, "--prompts", reinforcing.prompts]
    given += [*FLAGS, "--output.folder", tmp_path, "--reward", "tests"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code_runner, "find_box", find)
        with pytest.raises(SystemExit) as stop:
            main(list(map(str, given)))
        assert stop.value.code == 2
        assert "--unsafe-local-exec" in capsys.readouterr().err
        options, *_ = command.resolve(COMMAND, [*map(str, given), "--unsafe-local-exec"])
        (term,) = rewards_of(options).terms
    assert (term.name, len(asked)) == ("tests", 2)


def test_a_resumed_run_keeps_its_settings_but_for_those_given(
    reinforcing: Reinforcing, ran: Path, capsys: pytest.CaptureFixture
):
    assert settings_with(["--resume", str(ran)]) == load_grpo(ran / "grpo.json")
    changed = settings_with(["--resume", str(ran), "--reward", "boxed", "--kl", "0.5"])
    assert (changed.reward, changed.kl, changed.group) == (("boxed",), 0.5, 3)
    with pytest.raises(SystemExit):
        main(["--resume", str(ran), "--updates", "1"])
    assert "--updates is 1, was 2; allowed with --resume: 2" in capsys.readouterr().err


def settings_with(args: list[str]) -> GrpoConfig:
    return resolved(args)[0].grpo


def test_texts_are_not_trained_on_as_prompts(
    ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    with pytest.raises(SystemExit):
        train(["--init-from", str(ran), "--output.folder", str(tmp_path)])
    line = "data.format is prompts; allowed: with python -m dsv3_jax.grpo"
    assert line in capsys.readouterr().err
