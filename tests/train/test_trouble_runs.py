"""Whole runs in trouble: gradients that are not finite, spikes, damaged checkpoints, and what
the runs do about them.
"""

import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.checkpoint import store
from dsv3_jax.config import Phase, ScheduleConfig
from dsv3_jax.data.corpus import build_corpus
from dsv3_jax.data.packing import Rows
from dsv3_jax.model.cross_entropy import cross_entropy
from dsv3_jax.train import loss
from dsv3_jax.train.metrics import read_metrics
from tests.runs import (
    PROGRAMS,
    SmallRun,
    assert_same_checkpoint,
    contents,
    send_at_step,
    spike_at,
    timeless,
    write_config,
)


@pytest.fixture(scope="module")
def rows(small: SmallRun) -> Rows:
    with small.quick():
        return build_corpus(small.cfg.data, 300, 0, lambda line: None).train


@jax.custom_vjp
def poison(h_BTD: jax.Array, bad_B: jax.Array) -> jax.Array:
    """Its input; the gradient of bad rows is NaN."""
    return h_BTD


poison.defvjp(
    lambda h_BTD, bad_B: (h_BTD, bad_B),
    lambda bad_B, dh_BTD: (jnp.where(bad_B[:, None, None], jnp.nan, dh_BTD), None),
)


@pytest.fixture(scope="module")
def poisoned(rows: Rows, finished: Path) -> Iterator[None]:
    """Runs in which the gradients of row 5 and of rows 12 to 17 (steps 7 to 9) are NaN; their
    programs are forgotten afterwards. The run without trouble has been made before.
    """
    bad_RT = np.stack([rows[i].labels_T for i in (5, *range(12, 18))])

    def bad_cross_entropy(h_BTD, head_DV, labels_BT, weights_BT):
        bad_B = (labels_BT[:, None] == jnp.asarray(bad_RT)[None]).all(-1).any(-1)
        return cross_entropy(poison(h_BTD, bad_B), head_DV, labels_BT, weights_BT)

    known = dict(PROGRAMS)
    PROGRAMS.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "cross_entropy", bad_cross_entropy)
        yield
    PROGRAMS.clear()
    PROGRAMS.update(known)


@pytest.fixture(scope="module")
def passed(small: SmallRun, poisoned: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps, one of which was skipped. Not to be changed."""
    folder = tmp_path_factory.mktemp("passed")
    assert small.train("--config", small.config, "--output.folder", folder, pictures=True) == 0
    return folder / "small-001"


def events(run: Path) -> list[dict]:
    entries = read_metrics(run / "metrics.jsonl")
    return [e for e in entries if e["kind"] == "event" and e["event"] != "resumed"]


def test_with_debug_nans_the_layer_is_named(
    small: SmallRun, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    copy = Path(shutil.copytree(finished, tmp_path / "small-001"))
    checkpoint = store.load(copy / "checkpoints")
    # Finite weights whose product is not: the output of layer 1, not its weights.
    name = "layers.1.moe.shared.w_down_FD"
    checkpoint.arrays["params"][name] = np.full_like(checkpoint.arrays["params"][name], 3e38)
    store.save(copy / "checkpoints", 6, checkpoint.arrays, checkpoint.meta)
    more = ("--train.steps", 8, "--train.max_bad_steps", 1)
    assert small.train("--resume", copy, "--debug-nans", *more) == 3
    assert "the output of layers.1 is not finite" in capsys.readouterr().out


def test_weights_that_are_not_finite_end_a_run_and_are_not_saved(
    small: SmallRun, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Gradient and loss are finite; the first moment is so large that the update is not."""
    copy = Path(shutil.copytree(finished, tmp_path / "small-001"))
    checkpoint = store.load(copy / "checkpoints")
    for name, mu in checkpoint.arrays["mu"].items():
        checkpoint.arrays["mu"][name] = np.full_like(mu, 3e38)
    store.save(copy / "checkpoints", 6, checkpoint.arrays, checkpoint.meta)
    assert small.train("--resume", copy, "--train.steps", 8) == 3
    said = "the weights are not finite after update 7, at a learning rate of 0.01; the newest"
    assert f"stopped: {said} checkpoint is of step 6" in capsys.readouterr().out
    assert store.steps(copy / "checkpoints") == [4, 6]


def test_a_resumed_run_tells_what_changed(small: SmallRun, finished: Path, tmp_path: Path):
    copy = Path(shutil.copytree(finished, tmp_path / "small-001"))
    assert small.train("--resume", copy, "--train.steps", 7, "--schedule.bias-speed", 0.5) == 0
    entries = read_metrics(copy / "metrics.jsonl")
    (event,) = [entry for entry in entries if entry.get("event") == "resumed"]
    assert event["step"] == 6
    changed = "train.steps is 7, was 6; schedule.bias_speed is 0.5, was 0.001"
    assert event["text"] == f"after step 6; {changed}"
    page = (copy / "report.html").read_text()
    assert changed in page
    assert "No trouble" in page


def spiky(small: SmallRun, folder: Path, policy: str) -> int | None:
    """A run of 8 steps, saved after 4; validated after 3 and 6."""
    cfg = replace(small.cfg, train=replace(small.cfg.train, steps=8, spike=policy))
    write_config(folder / "spiky.py", cfg)
    return small.train("--config", folder / "spiky.py", "--output.folder", folder)


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_a_spike_is_skipped_and_where_asked_the_run_goes_back(
    small: SmallRun, tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch
):
    spike_at(monkeypatch, [5])
    assert spiky(small, tmp_path, policy) == 0
    run = tmp_path / "small-001"
    meta = store.load(run / "checkpoints").meta
    kinds = [event["event"] for event in events(run)]
    if policy == "skip":
        assert kinds == ["skipped"]
        assert (meta["step"], meta["consumed_rows"], meta["updates"]) == (8, 16, 7)
    else:
        # Steps 1 to 5, then 5 to 8 with the rows after those of the spike.
        assert kinds == ["skipped", "rewound"]
        assert (meta["step"], meta["consumed_rows"], meta["updates"]) == (8, 18, 8)
    assert (meta["skipped"], meta["skipped_in_a_row"]) == (1, 0)


def test_a_spike_in_the_last_step_sends_the_run_back_too(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And one in step 6, whose results are waited for before anything else is launched."""
    spike_at(monkeypatch, [6, 8])
    assert spiky(small, tmp_path, "rewind") == 0
    meta = store.load(tmp_path / "small-001" / "checkpoints").meta
    # 1 to 6, 5 to 8, 5 to 8.
    assert (meta["step"], meta["consumed_rows"], meta["updates"]) == (8, 28, 8)


@pytest.mark.parametrize(
    ("policy", "spikes", "said"),
    [
        ("skip", [5, 6, 7], "3 updates in a row were skipped, the last in step 7"),
        ("rewind", [5] * 4, "went back to step 4 3 times in vain"),
    ],
)
def test_spikes_without_end_end_the_run(
    small: SmallRun,
    tmp_path: Path,
    policy: str,
    spikes: list[int],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    spike_at(monkeypatch, spikes)
    assert spiky(small, tmp_path, policy) == 3
    assert f"stopped: {said}" in capsys.readouterr().out
    assert store.steps(tmp_path / "small-001" / "checkpoints") == [4]
    assert (tmp_path / "small-001" / "report.html").exists()


def test_a_run_that_starts_from_weights_takes_them_and_nothing_else(
    small: SmallRun, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    start = ("--init-from", finished, "--output.folder", tmp_path, "--train.steps", 1)
    still = ("--config", tmp_path / "still.py")
    schedule = ScheduleConfig(learning_rate=0.0, final_learning_rate=0.0, bias_speed=0.0)
    write_config(tmp_path / "still.py", replace(small.cfg, schedule=schedule))
    assert small.train(*start, *still) == 0
    run = tmp_path / "small-001"
    new, old = (store.load(path / "checkpoints") for path in (run, finished))
    for group in ("params", "router_bias"):
        for name, array in old.arrays[group].items():
            np.testing.assert_array_equal(new.arrays[group][name], array)
    assert (new.meta["step"], new.meta["updates"], new.meta["consumed_rows"]) == (1, 1, 2)
    assert any((old.arrays["mu"][name] != mu).any() for name, mu in new.arrays["mu"].items())
    assert (run / "tokenizer.json").read_bytes() == (finished / "tokenizer.json").read_bytes()
    assert f"from the weights of step 6 of {finished}" in capsys.readouterr().out
    origin = next(e for e in read_metrics(run / "metrics.jsonl") if e.get("event") == "weights")
    assert origin["text"] == f"of step 6 of {finished}"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ("--init-from", "{run}", "--model.d_model", 48),
            "another model: model.d_model is 48",
        ),
        (("--init-from", "{run}", "--resume", "{run}"), "--resume and --init-from: one run cannot"),
        (("--init-from", "nowhere"), "--init-from nowhere: no run there"),
        (("--profile", "3"), "--profile 3; allowed: START:STOP, steps counted from 1, as in 10:12"),
        (("--profile", "3:2"), "--profile 3:2; allowed: START:STOP"),
        (("--profile", "6:7"), "--profile 6:7; allowed: steps 1 to 6 of this run"),
    ],
)
def test_mistakes_are_one_line(
    small: SmallRun, finished: Path, args: tuple, said: str, capsys: pytest.CaptureFixture
):
    with pytest.raises(SystemExit) as stop:
        small.train("--config", small.config, *(str(arg).format(run=finished) for arg in args))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_run_that_keeps_one_checkpoint_goes_on_from_it_and_never_from_a_damaged_one(
    small: SmallRun,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    """The newest regular one, of step 2 and 4, is kept besides: a spike may send the run there."""
    run = tmp_path / "small-001"
    folder = run / "checkpoints"
    keep = ("--output.save_every", 2, "--output.keep_last", 1)
    with monkeypatch.context() as patch:
        send_at_step(patch, 3, signal.SIGTERM)
        start = ("--config", small.config, "--output.folder", tmp_path)
        assert small.train(*start, *keep) == 143
    assert store.steps(folder) == [2, 3]
    (folder / "step_00000003" / "manifest.json").write_text("{}")
    with monkeypatch.context() as patch:
        send_at_step(patch, 5, signal.SIGTERM)
        assert small.train("--resume", run) == 143
    shown = capsys.readouterr().out
    assert f"checkpoint skipped: checkpoint {folder / 'step_00000003'}: CRC-32" in shown
    assert "resumed after step 2\n" in shown
    assert store.steps(folder) == [4, 5]
    assert small.train("--resume", run) == 0
    assert store.steps(folder) == [6]
    assert timeless(run) == timeless(finished)
    checkpoint, same = (store.load(path / "checkpoints") for path in (run, finished))
    checkpoint.meta["config"] = same.meta["config"]
    store.save(folder, 6, checkpoint.arrays, checkpoint.meta)
    assert_same_checkpoint(run, finished, 6)


@pytest.mark.slow
def test_a_run_over_a_batch_ramp_with_an_average_resumes_bit_for_bit(
    small: SmallRun, tmp_path: Path
):
    """Stairs of 2 and 4 rows, fill-in-the-middle; stopped on the second stair, after 5 of 7 steps,
    and resumed with more readers.
    """
    schedule = replace(small.cfg.schedule, rows_phases=(Phase(0, 70, 2), Phase(70, 10**6, 4)))
    cfg = replace(
        small.cfg,
        train=replace(small.cfg.train, steps=7, rows=4, microbatches=2),
        schedule=schedule,
        data=replace(small.cfg.data, fim_rate=0.5),
        optimizer=replace(small.cfg.optimizer, ema_decay=0.5),
        output=replace(small.cfg.output, save_every=5, eval_every=5, sample_tokens=0),
    )
    write_config(tmp_path / "ramp.py", cfg)
    for name, steps in (("whole", 7), ("parts", 5)):
        args = ("--config", tmp_path / "ramp.py", "--output.folder", tmp_path / name)
        assert small.train(*args, "--train.steps", steps, pictures=steps == 7) == 0
    run = tmp_path / "parts" / "small-001"
    assert small.train("--resume", run, "--train.steps", 7, "--data.readers", 3) == 0
    whole = tmp_path / "whole" / "small-001"
    first, second = (store.load(path / "checkpoints", 7) for path in (whole, run))
    assert first.arrays.keys() == {"params", "router_bias", "mu", "nu", "average"}
    assert first.meta["consumed_rows"] == 3 * 2 + 4 * 4  # 70 tokens are passed by the third step
    assert [meta["config"]["data"]["readers"] for meta in (first.meta, second.meta)] == [1, 3]
    first.meta["config"] = second.meta["config"]
    store.save(whole / "checkpoints", 7, first.arrays, first.meta)
    assert_same_checkpoint(whole, run, 7)


def test_a_bad_row_is_named_its_update_skipped_and_the_run_goes_on(passed: Path, rows: Rows):
    (event,) = events(passed)
    assert (event["step"], event["event"]) == (3, "skipped")  # rows 4 and 5
    (name,) = rows.names_of(5)
    assert event["text"].startswith("update 3: main loss ")
    assert event["text"].endswith(f"gradient not finite in row 5 of the data ({name})")
    meta = store.load(passed / "checkpoints").meta
    assert (meta["step"], meta["updates"], meta["skipped"]) == (6, 5, 1)
    entries = read_metrics(passed / "metrics.jsonl")
    last = [entry for entry in entries if entry["kind"] == "train"][-1]
    assert last["skipped"] == 1
    assert np.isfinite(last["loss"])


def test_three_bad_updates_in_a_row_end_the_run_and_the_last_good_checkpoint_stays(
    small: SmallRun, passed: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    copy = Path(shutil.copytree(passed, tmp_path / "small-001"))
    before = contents(copy / "checkpoints")
    assert small.train("--resume", copy, "--train.steps", 20) == 3
    assert [event["step"] for event in events(copy)] == [3, 7, 8, 9]
    assert contents(copy / "checkpoints") == before
    shown = capsys.readouterr().out
    assert events(copy)[-1]["text"] in shown
    assert (
        "stopped: 3 updates in a row were skipped, the last in step 9 at a learning rate of 0.01; "
        f"the newest checkpoint is of step 6; what happened: {copy}/report.html"
    ) in shown
