"""Engines at work in tests: random requests that come and go, and what their texts must be."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.programs import Programs
from dsv3_jax.inference.requests import Request
from dsv3_jax.model.transformer import DeepSeekV3
from tests.shapes import TINY, compiled, random_model

# One MoE layer and two MTP modules: to compile an engine's programs takes a second for each layer.
MODEL = replace(TINY, num_layers=1, num_dense_layers=0, mtp_depth=2)
LARGER = replace(TINY, mtp_depth=2)
# Small layers: what comes next depends on the newest token most of all, which modules can learn.
DRAFTING = replace(MODEL, init_std=0.05)
# Of the two likeliest logits: nearer ones may change places between two float32 programs.
CLEAR = 1e-4


@contextlib.contextmanager
def programs_compiled_once() -> Iterator[None]:
    """Engines of one model and the same sizes share their programs."""
    known, real = {}, Programs._compile

    def compile_(self, body, *args):
        key = f"{body} {jax.tree.map(np.shape, args[2:])}"
        if key not in known:
            known[key] = real(self, body, *args)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Programs, "_compile", compile_)
        yield


@dataclass
class Told:
    """All that an engine said of one request."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: str | None = None


def random_requests(
    cfg: ModelConfig, count: int, seed: int, most_prompt: int = 40, most_new: int = 30
) -> list[Request]:
    """Of all lengths; two in five begin as another does, and some meet an end token."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, cfg.vocab_size, most_prompt).tolist()
    requests = []
    for _ in range(count):
        prompt = rng.integers(0, cfg.vocab_size, rng.integers(1, most_prompt)).tolist()
        if rng.random() < 0.4:
            alike = int(rng.integers(0, len(prompt)))
            prompt[:alike] = shared[:alike]
        end = frozenset([int(rng.integers(cfg.vocab_size))])
        requests.append(Request(prompt, int(rng.integers(1, most_new)), end_ids=end))
    return requests


def prompts_of(cfg: ModelConfig, lengths: Sequence[int], most_new: int) -> list[Request]:
    """Greedy requests with random prompts of these lengths."""
    rng = np.random.default_rng(list(lengths))
    return [Request(rng.integers(0, cfg.vocab_size, n).tolist(), most_new) for n in lengths]


def drafting_model() -> DeepSeekV3:
    """Its MTP modules see the token before them better than all else: of two drafts 0, 1 or 2 are
    the model's own.
    """
    model = random_model(DRAFTING)
    for module in model.mtp:
        w_DD_D = 0.5 * module.w_proj_DD_D[...]
        w_DD_D = w_DD_D.at[: DRAFTING.d_model].add(jnp.eye(DRAFTING.d_model))
        module.w_proj_DD_D = module.w_proj_DD_D.replace(w_DD_D)
    return model


def play(
    engine: Engine, requests: Sequence[Request], seed: int = 0, cancels: float = 0.05
) -> dict[int, Told]:
    """Requests join a few at a time, some are cancelled, until all have ended. Every turn's pages
    are accounted for.
    """
    rng, todo, told = np.random.default_rng(seed), list(requests), {}
    while todo or engine.pending:
        for request in [todo.pop() for _ in range(min(len(todo), int(rng.integers(0, 4))))]:
            told[engine.submit(request)] = Told(request)
        going = [i for i, one in told.items() if one.ended is None]
        if going and rng.random() < cancels:
            cancelled = int(rng.choice(going))
            assert engine.cancel(cancelled)
            told[cancelled].ended = "cancelled"
        for answer in engine.turn():
            one = told[answer.id]
            assert one.ended is None, "an answer after the end"
            one.tokens += answer.tokens
            one.logprobs += answer.logprobs
            one.ended = answer.ended
        for pages in engine.scheduler.pages:
            pages.check()
    assert all(pages.free == pages.count for pages in engine.scheduler.pages)
    return told


def check_texts(model: DeepSeekV3, told: Mapping[int, Told], tolerance: float = 1e-4) -> int:
    """Greedy texts are those of full forward passes up to the first unclear choice; their
    log-probabilities too, and they end where they should. -> how many had an unclear choice.
    """
    cfg, forward, unclear = model.cfg, compiled(model), 0
    for one in told.values():
        start, text = len(one.request.prompt), [*one.request.prompt, *one.tokens]
        row_1T = np.zeros((1, cfg.max_length), np.int32)
        row_1T[0, : len(text)] = text
        logits_TV = np.asarray(forward(row_1T))[0, start - 1 : len(text) - 1].astype(np.float64)
        logprob_TV = jax.nn.log_softmax(logits_TV, axis=-1)
        expected = [float(logprob_TV[i, token]) for i, token in enumerate(one.tokens)]
        assert np.abs(np.array(one.logprobs) - expected).max(initial=0) < tolerance
        ranked_TV = np.sort(logits_TV)
        for i, token in enumerate(one.tokens):
            if token != logits_TV[i].argmax():
                assert ranked_TV[i, -1] - ranked_TV[i, -2] < CLEAR, f"token {i} of {one}"
                unclear += 1
                break
        check_end(one, cfg.max_length)
    return unclear


def check_end(one: Told, longest: int) -> None:
    """A text ends at its end token or its length, not before and not after."""
    room = min(one.request.max_tokens, longest - len(one.request.prompt))
    ends = [i for i, token in enumerate(one.tokens) if token in one.request.end_ids]
    match one.ended:
        case "stop":
            assert ends == [len(one.tokens) - 1]
        case "length":
            assert len(one.tokens) == room
            assert not ends
        case "cancelled":
            assert len(one.tokens) < room
            assert not ends
        case _:
            raise AssertionError(f"{one} has not ended")


def expected_steps(model: DeepSeekV3, text: list[int], prompt: int) -> list[int]:
    """From one full forward pass over the finished text, in which every token is known.

    A first draft has seen true tokens alone. A second one has seen the first, which is the true
    token wherever the second is looked at.
    """

    @compiled
    def predictions(text_1T):
        h_BTD, _ = model.hidden(text_1T)
        return [model.logits(h)[0].argmax(-1) for h, _ in model.mtp_hidden(h_BTD, text_1T)]

    depths = [np.asarray(tokens_T) for tokens_T in predictions(jnp.asarray([text]))]
    newest, steps = prompt, []
    while newest + 1 < len(text):
        accepted = 0
        for k, tokens_T in enumerate(depths, start=1):
            if newest + k + 1 >= len(text) or tokens_T[newest - 1] != text[newest + k]:
                break
            accepted += 1
        steps.append(accepted + 1)
        newest += accepted + 1
    return steps


@contextlib.contextmanager
def count_compilations() -> Iterator[list[str]]:
    """A list that grows with whatever XLA compiles within the block, whoever asked for it."""
    found: list[str] = []
    _LISTENERS.append(found)
    try:
        yield found
    finally:
        _LISTENERS.remove(found)


_LISTENERS: list[list[str]] = []


def _heard(event: str, _: float, **more: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        for found in _LISTENERS:
            found.append(event)


jax.monitoring.register_event_duration_secs_listener(_heard)
