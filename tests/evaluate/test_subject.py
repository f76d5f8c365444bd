"""What a model is asked and told: cut at its beginning, counted, and as the trainer measures it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dsv3_jax.config import DataConfig, RunConfig, TrainConfig
from dsv3_jax.data.packing import Row
from dsv3_jax.evaluate.rolling import windows
from dsv3_jax.evaluate.subject import Pair
from dsv3_jax.inference.prompt_file import Wishes
from dsv3_jax.model.router import RouterBias
from dsv3_jax.train.step import TrainState
from dsv3_jax.train.validation import make_validate
from tests.evaluate.subjects import CFG, make_subject
from tests.inference.conftest import _quick  # noqa: F401
from tests.server.scripted import END, TOKENIZER
from tests.shapes import compiled

BOS, LONGEST = TOKENIZER.bos_id, CFG.max_length
TEXT = "A text of more bytes than a model of 16 tokens reads, with a € in it."


@pytest.fixture(scope="module")
def both():
    return make_subject()


LOGITS = compiled(lambda model, tokens_BT: model(tokens_BT))


def log_p(model, ids: list[int]) -> np.ndarray:
    """[T, V] of at most `LONGEST` ids."""
    row_1T = np.zeros((1, LONGEST), np.int32)
    row_1T[0, : len(ids)] = ids
    return np.asarray(jax.nn.log_softmax(jnp.asarray(LOGITS(model, row_1T))[0, : len(ids)], -1))


def greedy(model, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    while len(ids) < min(len(prompt) + count, LONGEST) and (
        len(ids) == len(prompt) or ids[-1] != END
    ):
        ids.append(int(log_p(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


def test_continuations_are_scored_behind_their_contexts(both):
    model, subject = both
    pairs = [
        Pair([BOS, *b"abc"], [*b"def"]),
        Pair([BOS], [7]),
        Pair([BOS, *range(40, 54)], [3, 4]),  # 17 ids, of which the last is not read
        Pair([BOS, *range(40, 54)], [3, 4, 5]),
    ]
    subject.counts.clear()
    found = subject.likelihoods(pairs)
    assert subject.counts == {"scored": 4, "cut": 1}
    for pair, (logprob, _) in zip(pairs, found, strict=True):
        ids = [*pair.context, *pair.continuation][-LONGEST - 1 :]
        log_p_TV = log_p(model, ids[:-1])
        asked = len(pair.continuation)
        own = log_p_TV[np.arange(len(ids) - 1 - asked, len(ids) - 1), ids[-asked:]]
        assert logprob == pytest.approx(own.sum(), abs=1e-4)


def test_only_what_the_model_would_write_is_greedy(both):
    model, subject = both
    prompt = [BOS, *b"abc"]
    own = greedy(model, prompt, 4)
    other = [*own[:-1], (own[-1] + 1) % CFG.vocab_size]
    pairs = [Pair(prompt, own), Pair(prompt, other)]
    assert [is_greedy for _, is_greedy in subject.likelihoods(pairs)] == [True, False]


def test_what_cannot_be_scored_is_refused(both):
    _, subject = both
    for pair in (Pair([], [1]), Pair([BOS], [1] * (LONGEST + 1))):
        with pytest.raises(ValueError, match=r"allowed: at most .* = 16, after 1 or more"):
            subject.likelihoods([pair])


def test_bits_per_byte_are_the_trainers_validation(both):
    """Over rows that hold the windows' tokens, and labels where a window scores."""
    model, subject = both
    stride = 8
    (score,) = subject.rolling([TEXT], stride)
    ids = [BOS, *TOKENIZER.encode(TEXT).tolist()]
    rows = []
    for window in windows(len(ids) - 1, LONGEST, stride):
        labels_T = np.array(ids[window.begin + 1 : window.end + 1], np.int32)
        labels_T[: len(labels_T) - window.scored] = -1
        rows.append(Row(np.array(ids[window.begin : window.end], np.int32), labels_T))
    assert len(rows) > 2
    cfg = RunConfig(
        model=CFG, data=DataConfig(length=LONGEST), train=TrainConfig(rows=2, dtype="float32")
    )
    graphdef, params, biases = nnx.split(model, nnx.Param, RouterBias)
    state = TrainState(params, biases, optax.EmptyState())
    validate = make_validate(graphdef, cfg, TOKENIZER.byte_lengths_V)
    found = validate(state, rows, range(len(rows)))
    assert score.bits_per_byte == pytest.approx(found.bits_per_byte, rel=1e-6)
    assert score.nats_per_token == pytest.approx(found.loss, rel=1e-6)
    assert score.bytes == found.bytes == len(TEXT.encode())


def test_several_texts_are_scored_as_each_alone(both):
    _, subject = both
    texts = [TEXT, "short", TEXT[::-1]]
    together = subject.rolling(texts, 8)
    for text, score in zip(texts, together, strict=True):
        assert score.nats == pytest.approx(subject.rolling([text], 8)[0].nats, rel=1e-6)


@pytest.mark.slow
def test_texts_are_the_models_own_to_their_stop_or_end(both):
    model, subject = both
    prompts = [[BOS, *b"abc"], [BOS], [BOS, *b"xyz"]]
    plain = subject.write(prompts, [Wishes(6)] * 3)
    for prompt, text in zip(prompts, plain, strict=True):
        ids = greedy(model, prompt, 6)
        assert text == TOKENIZER.decode(ids[:-1] if ids[-1] == END else ids)
    stop = plain[0][2]
    (stopped,) = subject.write(prompts[:1], [Wishes(6, stop=(stop,))])
    assert stopped == plain[0][: plain[0].index(stop)]


@pytest.mark.slow
def test_a_seed_decides_what_is_drawn(both):
    _, subject = both
    prompts = [[BOS, *b"abc"]] * 3
    wishes = [Wishes(8, 1.0, seed=seed) for seed in (1, 1, 2)]
    one, same, other = subject.write(prompts, wishes)
    assert one == same != other


@pytest.mark.slow
def test_long_prompts_lose_their_beginning_for_the_answer(both):
    """An answer has the room that it wishes, up to half of what the model holds."""
    model, subject = both
    subject.counts.clear()
    prompt = [BOS, *range(30, 60)]
    four, long = subject.write([prompt, prompt], [Wishes(4), Wishes(100)])
    assert subject.counts["cut"] == 2
    for text, room in ((four, 4), (long, LONGEST // 2)):
        ids = greedy(model, prompt[-LONGEST + room :], room)
        assert text == TOKENIZER.decode(ids[:-1] if ids[-1] == END else ids)
    assert subject.counts["shortened"] == 1
