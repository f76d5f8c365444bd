"""lm-eval's view of a model is the one that lm-eval's own transformers model gives of it."""

import importlib
from types import ModuleType

import pytest

from dsv3_jax.evaluate.rolling import windows
from tests.inference.conftest import _quick  # noqa: F401

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # lm-eval's and its many requirements' own
]
TOLERANCE = 1e-3  # nats, of texts of up to 200 tokens
LONG = "The answer is: yes, no, A, B, C or D. " * 6  # beyond the model's 64 tokens
PAIRS = [
    ("Water boils at", " 100 degrees."),
    ("Water boils at ", "100 degrees."),  # the space is scored with what follows
    *(("The answer is:", f" {letter}") for letter in "ABCD"),
    ("水在一百度", "沸腾。"),
    ("", "The answer"),
    (LONG, " B"),
    (LONG, " The answer is: yes"),
]


@pytest.fixture(scope="module", autouse=True)
def _lm_eval() -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    """Where torch and transformers can be imported, and only for these tests."""
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    return importlib.import_module("tests.evaluate.hf_harness")


@pytest.fixture(scope="module")
def both(theirs, tmp_path_factory):
    return theirs.make_both(tmp_path_factory.mktemp("model") / "hf")


def instances(kind: str, arguments: list[tuple]) -> list:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)
    ]


def test_log_likelihoods_and_greedy_flags_are_those_of_the_transformers_model(both):
    asked = instances("loglikelihood", PAIRS)
    both.ours.subject.counts.clear()
    found, expected = (lm.loglikelihood(asked) for lm in both)
    for one, (logprob, greedy), (their_logprob, their_greedy) in zip(
        PAIRS, found, expected, strict=True
    ):
        assert abs(logprob - their_logprob) < TOLERANCE, one
        assert greedy == their_greedy, one
    assert both.ours.subject.counts["cut"] == 2


def test_what_the_model_would_write_is_flagged_as_greedy_by_both(both):
    """Of all tokens that are text, each as a continuation: one is flagged, by both the same."""
    tokenizer = both.ours.subject.tokenizer
    flagged = 0
    for context in ("The answer is:", "Water boils at", "yes"):
        texts = {data.decode(errors="ignore") for data in tokenizer.token_bytes} - {""}
        before = tokenizer.encode(context).tolist()
        texts = sorted(t for t in texts if len(tokenizer.encode(context + t)) == len(before) + 1)
        asked = instances("loglikelihood", [(context, text) for text in texts])
        found, expected = (lm.loglikelihood(asked) for lm in both)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        flagged += sum(greedy for _, greedy in found)
    assert flagged


def test_rolling_log_likelihoods_are_those_of_the_transformers_model(both, monkeypatch):
    """Without the begin of a sentence that it would predict after the begin of a sentence."""
    monkeypatch.setattr(both.theirs, "add_bos_token", False)
    asked = instances("loglikelihood_rolling", [("Water",), (LONG,), (LONG * 3,)])
    found, expected = (lm.loglikelihood_rolling(asked) for lm in both)
    for ours, theirs in zip(found, expected, strict=True):
        assert abs(ours - theirs) < TOLERANCE


@pytest.mark.parametrize(("tokens", "longest"), [(0, 5), (3, 5), (5, 5), (6, 5), (23, 5), (7, 1)])
def test_windows_are_lm_evals(tokens, longest):
    """Tokens 1, 2 ... behind a 0, in windows that overlap by all but so many."""
    from lm_eval.utils import get_rolling_token_windows

    ids = list(range(tokens + 1))
    for stride in range(1, longest + 1):
        context = longest - stride + 1
        theirs = [*get_rolling_token_windows(ids[1:], 0, longest, context)]
        ours = [
            (ids[w.begin : w.end], ids[w.end - w.scored + 1 : w.end + 1])
            for w in windows(tokens, longest, stride)
        ]
        assert ours == theirs


def test_texts_are_those_of_the_transformers_model(both):
    wish = {"max_gen_toks": 12, "do_sample": False}
    contexts = ["Water boils at", "The answer is:", "水在一百度", LONG, "yes"]
    plain = both.ours.generate_until(
        instances("generate_until", [(text, {"until": [], **wish}) for text in contexts])
    )
    # Stop strings that occur: a character in the middle of what is written.
    stops = [text[len(text) // 2] for text in plain]
    assert all(stops)
    for until in ([], stops):
        asked = instances("generate_until", [(text, {"until": until, **wish}) for text in contexts])
        found, expected = (lm.generate_until(asked) for lm in both)
        assert found == expected
    assert found != plain
