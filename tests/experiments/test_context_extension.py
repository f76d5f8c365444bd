"""Retrieval documents, models with other positions, losses by position; the experiment in small."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import YarnConfig
from dsv3_jax.data.documents import Document
from dsv3_jax.data.tokenizer import load_tokenizer, train_tokenizer
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.train.__main__ import resolve
from tests.experiments.loading import run_module
from tests.runs import jax_option
from tests.shapes import compiled, random_model, random_tokens, tiny_model

FOLDER = Path(__file__).parents[2] / "experiments" / "context_extension"
SHORT = YarnConfig(factor=4.0, original_length=16, beta_fast=2.0, beta_slow=0.5)
CFG = tiny_model(num_layers=1, num_dense_layers=1, mtp_depth=0, max_length=16, yarn=SHORT)


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with jax_option("jax_disable_most_optimizations"):
        yield


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return run_module("context_extension", monkeypatch)


@pytest.fixture
def retrieval(experiment: ModuleType) -> ModuleType:
    return sys.modules["retrieval"]


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    return random_model(CFG, seed=2)


# --- documents ---


def test_a_document_states_one_needle_again_and_again_among_source(retrieval, monkeypatch):
    library = [
        Document(f"{i}", "".join(f"line {k} of text {i}\n" for k in range(300))) for i in range(60)
    ]
    monkeypatch.setattr(retrieval, "iterate_documents", lambda source: iter(library))
    monkeypatch.setattr(retrieval, "is_held_out", lambda text, fraction: "text 7\n" in text)
    found = list(retrieval.documents(256, 40, seed=1))
    assert found == list(retrieval.documents(256, 40, seed=1))
    assert found != list(retrieval.documents(256, 40, seed=2))
    sizes = [len(text) / retrieval.BYTES / 256 for text in found]
    assert 1 <= min(sizes) < max(sizes) < 2.2
    assert np.std(sizes) > 0.2
    assert not any("text 7\n" in text for text in found)
    assert sum("text 8\n" in text for text in found) > 5
    stated = [Counter(x for x in text.split("\n") if "secret word" in x) for text in found]
    assert all(len(counts) == 1 for counts in stated)
    assert np.mean([sum(counts.values()) for counts in stated]) > 5
    words = {next(iter(counts)).split()[-1].strip(".") for counts in stated}
    assert len(words) > 20
    assert words <= set(retrieval.WORDS)


def test_the_tokenizer_has_a_token_for_each_of_the_words(retrieval, monkeypatch, tmp_path):
    library = [Document(f"{i}", f"line {i} of text and word\n" * 99) for i in range(9)]
    monkeypatch.setattr(retrieval, "iterate_documents", lambda source: iter(library))
    monkeypatch.setattr(retrieval, "OFTEN", 100)
    path = retrieval.write_tokenizer(tmp_path / "new" / "tokenizer.json", 1024)
    tokenizer = load_tokenizer(path)
    assert {len(tokenizer.encode(f" {word}")) for word in retrieval.WORDS} == {1}
    assert len(tokenizer.encode(" word of text")) < 8
    monkeypatch.delattr(retrieval, "train_tokenizer")
    assert retrieval.write_tokenizer(path, 1024) == path


def test_a_file_of_documents_is_written_once(retrieval, tmp_path):
    for texts in (["one", "two"], ["three"]):
        path = retrieval.write_documents(tmp_path / "new" / "a.jsonl", texts)
        lines = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        assert lines == ["one", "two"]


# --- runs ---


def test_a_phase_changes_the_longest_sequence_and_nothing_else_of_the_model(
    experiment, tmp_path, monkeypatch
):
    asked = {}

    def train(folder: Path, name: str, *options: str, config: Path) -> Path:
        if "--init-from" in options:
            at = options.index("--init-from")
            asked[name] = options[at + 1]
            options = (*options[:at], *options[at + 2 :])
        runs[name] = resolve(["--config", str(config), *options])[0].run
        return folder / f"{name}-001"

    runs: dict = {}
    monkeypatch.setattr(experiment, "train", train)
    monkeypatch.setattr(experiment, "write_documents", lambda path, texts: path)
    monkeypatch.setattr(experiment, "write_tokenizer", lambda path, vocab_size: path)
    monkeypatch.setattr(experiment, "unscaled", lambda run, out: out)
    variants = experiment.trained_runs(experiment.Options(folder=tmp_path, steps=7))
    assert [variant.yarn for variant in variants] == [False, True, True, True, False, False]
    first, original = experiment.PHASES[0], runs.pop("original")
    for name, cfg in runs.items():
        yarn, length = name.startswith("yarn"), cfg.data.length
        allowed = {"max_length": length} | ({} if yarn else {"yarn": cfg.model.yarn})
        assert cfg.model == replace(original.model, **allowed)
        assert cfg.model.yarn_active == yarn
        assert cfg.train.rows * length == original.train.rows * original.data.length
        assert cfg.train.steps == 7
        rate = cfg.schedule.learning_rate
        assert rate == cfg.schedule.final_learning_rate == original.schedule.final_learning_rate
        start = Path(asked[name]).name
        if length == first:
            assert start == ("original-001" if yarn else "original_unscaled")
        else:
            assert start == f"{'yarn' if yarn else 'plain'}_{first}-001"
    assert not original.model.yarn_active


# --- positions ---


def test_other_positions_leave_every_weight(experiment, model):
    longer = experiment.with_positions(model, 64, yarn=False)
    before, after = (jax.tree.leaves(nnx.state(one)) for one in (model, longer))
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (longer.cfg.max_length, longer.cfg.yarn_active) == (64, False)
    tokens_BT = random_tokens(CFG, 2, 16)
    run = compiled(lambda model, tokens_BT: model(tokens_BT))
    short, long = (np.asarray(run(one, tokens_BT)) for one in (model, longer))
    np.testing.assert_array_equal(short, long)
    scaled = experiment.of_config(model, replace(CFG, max_length=64))
    assert scaled.cfg.yarn_active
    assert np.abs(run(scaled, tokens_BT) - short).max() > 1e-3


def test_losses_are_those_of_each_token_and_windows_predict_the_same(experiment, model):
    rows_BT = np.asarray(random_tokens(CFG, 3, 17))
    found = experiment.losses_of(model, rows_BT)
    logits_BTV = np.asarray(compiled(lambda model, x: model(x))(model, rows_BT[:, :-1]), np.float64)
    log_p_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p_BTV, rows_BT[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    windows_BT = experiment.in_windows(rows_BT, 4)
    assert windows_BT.shape == (12, 5)
    np.testing.assert_array_equal(windows_BT[:, 1:].reshape(3, 16), rows_BT[:, 1:])
    np.testing.assert_array_equal(windows_BT[:, :-1].reshape(3, 16), rows_BT[:, :-1])


def test_stretches_of_positions_leave_none_out(experiment):
    loss_T = np.arange(100.0)
    middles, means = experiment.by_stretches(loss_T)
    assert means == pytest.approx([middle - 0.5 for middle in middles])
    assert (means[0], middles[0]) == (7.5, 8)
    assert middles[-1] < 100
    line = experiment.loss_table({"x": np.arange(2048.0)})[2]
    assert line.startswith("| x | 15.500 | 47.500 | 95.500 |")


# --- the command ---


@pytest.mark.slow
def test_the_experiment_in_small(experiment, model, monkeypatch, capsys, tmp_path):
    tokenizer = train_tokenizer(["some text"], 262)
    tokenizer.save(tmp_path / "tokenizer.json")
    of = replace(CFG, vocab_size=262)
    made = random_model(of)
    variants = [experiment.Variant(name, tmp_path, name == "b") for name in "abcdef"]
    monkeypatch.setattr(experiment, "trained_runs", lambda options: variants)
    monkeypatch.setattr(experiment, "read_model", lambda run: SimpleNamespace(model=made))
    monkeypatch.setattr(
        experiment, "held_out_rows", lambda *args: np.asarray(random_tokens(of, 2, 257))
    )
    monkeypatch.setattr(experiment, "LENGTHS", (128, 256))
    monkeypatch.setattr(experiment, "LONGEST", 256)
    monkeypatch.setattr(experiment, "EDGES", (0, 128, 256))
    monkeypatch.setattr(experiment, "HERE", tmp_path)
    experiment.main(["--depths", "2", "--needles", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| a |") for line in lines) == 3
    assert f"| {experiment.WINDOWS} |" in " ".join(lines)
    for name in ("needles.png", "losses.png"):
        assert 5_000 < (tmp_path / name).stat().st_size < 150_000


def test_what_cannot_be_measured_is_told_in_a_line(experiment, capsys):
    with pytest.raises(SystemExit, match="2"):
        experiment.main(["--steps", "0"])
    assert "--steps is 0; allowed: 1 or more" in capsys.readouterr().err
