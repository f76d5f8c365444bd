"""EleutherAI's lm-eval asks a model of ours: log-likelihoods, rolling ones, texts.

Importing this file needs lm-eval. Ids are ours: contexts begin with a begin-of-sentence token, or
as the chat template has them; what a question spells is never taken for a mark of a turn.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from dsv3_jax.data.hashing import key64
from dsv3_jax.evaluate.conversations import Conversations
from dsv3_jax.evaluate.subject import Pair, Subject
from dsv3_jax.inference.prompt_file import SEEDS, Wishes

DEFAULT_TOKENS = 256
"""Most tokens of an answer to a task that does not say; lm-eval's own default"""
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# What changes nothing at these values; other values ask for what is not here.
_IDLE = {"top_k": (0, -1, None), "num_beams": (1, None), "num_return_sequences": (1, None)}
_SERVED = ("until", "do_sample", "temperature", "top_p", *_LIMITS)


class Harness(TemplateLM):
    """lm-eval's view of a model.

    Attributes:
        seed: of what is drawn; a request's own is a function of it and of its place in a call.
        temperature: instead of the tasks' own, if it is not None.
    """

    def __init__(
        self, subject: Subject, chat: Conversations | None = None, max_tokens: int | None = None
    ) -> None:
        """With `chat` contexts are conversations. `max_tokens` of every answer, whatever its task
        says.
        """
        super().__init__()
        self.subject, self.seed, self.temperature = subject, 0, None
        self._chat, self._max_tokens = chat, max_tokens
        self._ends = chat.ends() if chat else frozenset()

    # --- ids -------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.subject.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Before a text that has no context."""
        return self.subject.bos_id

    @property
    def max_length(self) -> int:
        return self.subject.longest

    @property
    def tokenizer_name(self) -> str:
        """Tells apart the requests that lm-eval may have kept for another tokenizer or template."""
        name = f"dsv3_jax-{self.subject.tokenizer.content_hash[:16]}"
        return name if self._chat is None else f"{name}-{self._chat.fingerprint}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **others: Any
    ) -> list[int]:
        """Ids of a context; with `add_special_tokens` False those of the text alone."""
        if add_special_tokens is False:
            return self.subject.encode(string)
        if self._chat is not None:
            return self._chat.ids(string)
        return [self.prefix_token_id, *self.subject.encode(string)]

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text, to where the assistant begins to speak; or else goes on."""
        if self._chat is None:
            raise ValueError("a conversation is asked for; allowed: with --chat")
        return self._chat.text(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template's source."""
        return "" if self._chat is None else self._chat.source

    # --- requests --------------------------------------------------------------------------------

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Of each continuation after its context: log p in nats, whether it is the likeliest."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **others: Any
    ) -> list[tuple[float, bool]]:
        return self.subject.likelihoods([Pair(*ids) for _, *ids in requests])

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Log p of whole texts, each token scored once, in windows that hardly overlap."""
        scores = self.subject.rolling([request.args[0] for request in requests])
        return [-score.nats for score in scores]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """What the model writes after each context, up to one of its `until` strings."""
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        wishes = [self._wishes(request.args[1], place) for place, request in enumerate(requests)]
        return self.subject.write(contexts, wishes, self._ends)

    def _wishes(self, asked: Mapping[str, Any], place: int) -> Wishes:
        wishes = wishes_of(asked)
        return replace(
            wishes,
            max_tokens=self._max_tokens or wishes.max_tokens,
            temperature=wishes.temperature if self.temperature is None else self.temperature,
            seed=key64("answer", self.seed, place) % SEEDS,
        )


def wishes_of(asked: Mapping[str, Any]) -> Wishes:
    """lm-eval's `generation_kwargs`. ValueError for those that are not here."""
    for name, value in asked.items():
        _check_field(name, value)
    limits = [name for name in _LIMITS if asked.get(name) is not None]
    until = asked.get("until") or []
    until = [until] if isinstance(until, str) else until
    if not (isinstance(until, list | tuple) and all(isinstance(text, str) for text in until)):
        raise ValueError(f"generation_kwargs: until {until!r}; allowed: a text or a list of them")
    temperature = _number("temperature", asked.get("temperature") or 0, float)
    return Wishes(
        _number(limits[0], asked[limits[0]], int) if limits else DEFAULT_TOKENS,
        0.0 if asked.get("do_sample") is False else temperature,
        _number("top_p", asked.get("top_p") or 1, float),
        stop=tuple(filter(None, until)),
    )


def _check_field(name: str, value: Any) -> None:
    if name in _SERVED or (name in _IDLE and value in _IDLE[name]):
        return
    idle = {known: " or ".join(map(json.dumps, values)) for known, values in _IDLE.items()}
    alone = ", ".join(f"{known} ({values})" for known, values in idle.items())
    allowed = idle.get(name, f"{', '.join(_SERVED)}; and at these values alone {alone}")
    raise ValueError(f"generation_kwargs: {name} {value!r}; allowed: {allowed}")


def _number(name: str, value: Any, kind: type) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"generation_kwargs: {name} {value!r}; allowed: a number") from None
