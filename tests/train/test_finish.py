"""What a finished run leaves behind, and how long its sample may be."""

import json
import zlib
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.config import RunConfig
from dsv3_jax.data.corpus import Corpus, build_corpus
from dsv3_jax.train import finish as finish_module
from dsv3_jax.train.finish import continuation
from dsv3_jax.train.metrics import read_metrics
from dsv3_jax.train.step import TrainState
from dsv3_jax.train.validation import text_of
from tests.runs import SmallRun


@pytest.fixture
def corpus(small: SmallRun) -> Corpus:
    with small.quick():
        return build_corpus(small.cfg.data, small.cfg.model.vocab_size, 0, lambda line: None)


def test_the_result_is_the_whole_validation_beside_zlib_on_the_same_bytes(
    finished: Path, corpus: Corpus
):
    result = json.loads((finished / "result.json").read_text())
    last = read_metrics(finished / "metrics.jsonl")[-1]
    assert (last["kind"], last["rows"]) == ("validation", len(corpus.validation))
    held_out = text_of(corpus.validation, corpus.tokenizer.token_bytes)
    assert result["validation_bytes"] == last["bytes"] == len(held_out)
    assert result["bits_per_byte"] == last["bits_per_byte"]
    assert result["validation_loss"] == last["loss"]
    assert result["zlib_bits_per_byte"] == 8 * len(zlib.compress(held_out, 9)) / len(held_out)
    assert (result["steps"], result["tokens"]) == (6, 6 * 2 * 16)


def test_a_sample_ends_where_the_model_ends_the_text(
    small: SmallRun, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
):
    ids = corpus.tokenizer.encode("spam").tolist()
    drawn = jnp.asarray([[*ids, corpus.tokenizer.eos_id, *ids]])
    monkeypatch.setattr(finish_module, "sample", lambda *args: drawn)
    monkeypatch.setattr(finish_module.nnx, "merge", lambda *parts: None)
    state = TrainState(None, None, None)
    assert continuation(None, state, small.cfg, corpus) == "spam"


def test_a_finished_run_has_all_its_files_and_no_others(finished: Path):
    names = "checkpoints config.json curves.png metrics.jsonl result.json sample.txt tokenizer.json"
    assert sorted(path.name for path in finished.iterdir()) == names.split()
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((finished / "result.json").read_text())
    sample = (finished / "sample.txt").read_bytes().decode()
    assert sample == result["sample_prompt"] + result["sample_text"]
    assert sample.startswith("def ")
    assert len(sample) > len("def ")


@pytest.mark.parametrize(
    ("prompt", "wanted", "asked"),
    [
        ("x", 8, 8),
        ("x", 10**6, 62),  # of 64, after bos and one letter
        ("", 8, 8),  # bos alone
        ("x", 0, None),
        ("abcdefgh" * 20, 8, None),  # no room after the prompt
    ],
)
def test_a_sample_follows_bos_and_prompt_and_ends_at_the_longest_sequence(
    small: SmallRun,
    corpus: Corpus,
    prompt: str,
    wanted: int,
    asked: int | None,
    monkeypatch: pytest.MonkeyPatch,
):
    seen = []

    def sample(model, prompt_BT, key, num_tokens, temperature):
        seen.append((prompt_BT, num_tokens, float(temperature)))
        return jnp.asarray([corpus.tokenizer.encode("spam")])

    monkeypatch.setattr(finish_module, "sample", sample)
    monkeypatch.setattr(finish_module.nnx, "merge", lambda *parts: None)
    changes = {"sample_prompt": prompt, "sample_tokens": wanted, "sample_temperature": 0.25}
    output = replace(small.cfg.output, **changes)
    cfg: RunConfig = replace(small.cfg, output=output)
    text = continuation(None, TrainState(None, None, None), cfg, corpus)
    assert text == ("spam" if asked else "")
    if asked:
        ((prompt_BT, num_tokens, heat),) = seen
        ids = [corpus.tokenizer.bos_id, *corpus.tokenizer.encode(prompt).tolist()]
        assert jax.device_get(prompt_BT).tolist() == [ids]
        assert num_tokens == asked
        assert heat == 0.25
    else:
        assert seen == []
