"""lm-eval's model of an API has the log-likelihoods that the model itself has."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.transformer import DeepSeekV3
from tests.server.models import MODEL, model_and_service
from tests.server.scripted import END, TOKENIZER
from tests.server.serving import serving
from tests.shapes import compiled

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # lm-eval's and its many requirements' own
]


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[DeepSeekV3, str]]:
    model, service = model_and_service(drafts=0, queue=32)
    with serving(service) as base:
        yield model, base


def test_log_likelihoods_and_texts_are_the_models(served):
    """With the server's own tokenizer, which lm-eval finds by itself."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model, base = served
    client = LocalCompletionsAPI(
        base_url=f"{base}/v1/completions", model="model", max_length=64, num_concurrent=1
    )
    pairs = [("some te", "xt"), ("a", "bcd"), ("", "some")]
    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i)
        for i, pair in enumerate(pairs)
    ]
    found = client.loglikelihood(asked)
    for (context, answer), (logprob, greedy) in zip(pairs, found, strict=True):
        expected, is_greedy = likelihood(model, context, answer)
        assert abs(logprob - expected) < 1e-3
        assert greedy == is_greedy
    wish = {"until": ["\n"], "max_gen_toks": 8, "temperature": 0}
    (text,) = client.generate_until(
        [Instance(request_type="generate_until", doc={}, arguments=("some", wish), idx=0)]
    )
    assert text == greedy_text(model, "some", 8).partition("\n")[0]


def logits_of(model: DeepSeekV3, ids: list[int]) -> np.ndarray:
    row_1T = np.zeros((1, MODEL.max_length), np.int32)
    row_1T[0, : len(ids)] = ids
    return np.asarray(compiled(model)(row_1T))[0, : len(ids)]


def likelihood(model: DeepSeekV3, context: str, answer: str) -> tuple[float, bool]:
    """lm-eval's way: without a token that begins a text, behind an end where nothing is before."""
    before = TOKENIZER.encode(context).tolist() or [END]
    after = TOKENIZER.encode(answer).tolist()
    logits_TV = logits_of(model, before + after)[len(before) - 1 : -1]
    logprob_TV = np.asarray(jax.nn.log_softmax(jnp.asarray(logits_TV), axis=-1))
    own_T = logprob_TV[np.arange(len(after)), after]
    return float(own_T.sum()), bool((logits_TV.argmax(-1) == after).all())


def greedy_text(model: DeepSeekV3, prompt: str, count: int) -> str:
    ids = TOKENIZER.encode(prompt).tolist()  # lm-eval sends ids, and none before these
    begin = len(ids)
    for _ in range(count):
        ids.append(int(logits_of(model, ids)[-1].argmax()))
        if ids[-1] == END:
            break
    return TOKENIZER.decode(ids[begin:])
