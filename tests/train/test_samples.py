"""A sample: where it starts, and where it ends."""

from dataclasses import replace

import pytest

from dsv3_jax.config import RunConfig
from dsv3_jax.data.corpus import Corpus, build_corpus
from dsv3_jax.train import samples as samples_module
from dsv3_jax.train.samples import continuation
from dsv3_jax.train.step import TrainState
from tests.runs import SmallRun


@pytest.fixture
def corpus(small: SmallRun) -> Corpus:
    with small.quick():
        return build_corpus(small.cfg.data, small.cfg.model.vocab_size, 0, lambda line: None)


def test_a_sample_ends_where_the_model_ends_the_text(
    small: SmallRun, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
):
    ids = corpus.tokenizer.encode("spam").tolist()
    drawn = [[token] for token in (*ids, corpus.tokenizer.eos_id, *ids)]
    monkeypatch.setattr(samples_module, "continued", lambda *args: drawn)
    monkeypatch.setattr(samples_module, "lay_out", lambda model: None)
    monkeypatch.setattr(samples_module.nnx, "merge", lambda *parts: None)
    state = TrainState(None, None, None)
    assert continuation(None, state, small.cfg, corpus) == "spam"


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

    def continued(weights, prompt_BT, num_tokens, how):
        seen.append((prompt_BT, num_tokens, float(how.temperature)))
        return [[token] for token in corpus.tokenizer.encode("spam")]

    monkeypatch.setattr(samples_module, "continued", continued)
    monkeypatch.setattr(samples_module, "lay_out", lambda model: None)
    monkeypatch.setattr(samples_module.nnx, "merge", lambda *parts: None)
    changes = {"sample_prompt": prompt, "sample_tokens": wanted, "sample_temperature": 0.25}
    output = replace(small.cfg.output, **changes)
    cfg: RunConfig = replace(small.cfg, output=output)
    text = continuation(None, TrainState(None, None, None), cfg, corpus)
    assert text == ("spam" if asked else "")
    if asked:
        ((prompt_BT, num_tokens, heat),) = seen
        ids = [corpus.tokenizer.bos_id, *corpus.tokenizer.encode(prompt).tolist()]
        assert prompt_BT.tolist() == [ids]
        assert num_tokens == asked
        assert heat == 0.25
    else:
        assert seen == []
