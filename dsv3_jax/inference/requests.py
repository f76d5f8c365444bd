"""What is asked of an engine, and what it answers."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from dsv3_jax.inference.sampling import check_sampling

if TYPE_CHECKING:
    import numpy as np

    from dsv3_jax.inference.handover import Handover
    from dsv3_jax.inference.step import ReadScores

Ended = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """A text to go on with."""

    prompt: Sequence[int]
    """Token ids, one or more"""
    max_tokens: int
    """Most new tokens; the model's longest text may end it earlier"""
    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token"""
    top_p: float = 1.0
    """Draw from the likeliest tokens of this total probability"""
    seed: int = 0
    """0 to 2^32 - 1. With the position it decides what is drawn, whoever the neighbours are"""
    end_ids: frozenset[int] = frozenset()
    """Tokens that end the text; the one that does is told, as its last"""
    prompt_logprobs: bool = False
    """Tell of the prompt's tokens what is told of the answer's; an engine must be set to"""

    def copied(self) -> "Request":
        """The same; later changes of the caller's lists are none of it."""
        return replace(self, prompt=tuple(self.prompt), end_ids=frozenset(self.end_ids))

    def check(self, vocab_size: int, longest: int) -> None:
        """ValueError, one line, for what cannot be done."""
        if not len(self.prompt):
            raise ValueError("the prompt is empty; allowed: 1 token or more")
        for token in (*self.prompt, *self.end_ids):
            if not (_is_whole(token) and 0 <= token < vocab_size):
                raise ValueError(f"token id {token}; allowed: 0 to {vocab_size - 1}")
        if len(self.prompt) >= longest:
            raise ValueError(
                f"the prompt has {len(self.prompt)} tokens; allowed: below {longest}, the longest "
                "text here"
            )
        if not (_is_whole(self.max_tokens) and self.max_tokens >= 1):
            raise ValueError(f"max_tokens is {self.max_tokens}; allowed: 1 or more")
        if not _is_whole(self.seed):
            raise ValueError(f"seed is {self.seed}; allowed: 0 to 2^32 - 1")
        check_sampling(self.seed, self.temperature, self.top_p)


def _is_whole(number: object) -> bool:
    """Python's, NumPy's or JAX's."""
    try:
        operator.index(number)
    except TypeError:
        return False
    return not isinstance(number, bool)


@dataclass
class Scores:
    """Of a prompt's tokens from the second on, given those before."""

    logprobs: list[float] = field(default_factory=list)
    """As of `Answer`"""
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    """As of `Answer`"""


@dataclass
class Answer:
    """New tokens of one request since the last answer."""

    id: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """The natural logarithm of each one's probability at temperature 1"""
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    """Beside each, `top_logprobs` likeliest tokens and their log-probabilities, likeliest first"""
    ended: Ended | None = None
    """By one of its `end_ids`, or by its length; None: it goes on"""
    prompt: Scores | None = None
    """With the first token, if it was asked for"""

    def add(self, more: "Answer") -> None:
        """What came after it."""
        self.tokens += more.tokens
        self.logprobs += more.logprobs
        self.top += more.top
        self.ended = more.ended
        self.prompt = self.prompt or more.prompt


def pairs(top_Tn: "np.ndarray", top_logprob_Tn: "np.ndarray") -> list[list[tuple[int, float]]]:
    """Of every token the likeliest ones, with their log-probabilities."""
    both = zip(top_Tn.tolist(), top_logprob_Tn.tolist(), strict=True)
    return [list(zip(*of_token, strict=True)) for of_token in both]


@dataclass(eq=False)
class Text:
    """A request on its way."""

    id: int
    request: Request
    limit: int
    """Most tokens of prompt and answer together"""
    tokens: list[int]
    """Prompt and answer so far"""
    shard: int = -1
    row: int = -1
    """Where it goes on; -1 while it waits"""
    pages: list[int] = field(default_factory=list)
    borrowed: int = 0
    """Of the pages, the first ones, which others may hold too"""
    read: int = 0
    """Tokens whose latents are in its pages"""
    began: bool = False
    """Whether a chunk was read since it has its row"""
    logprobs: list[float] = field(default_factory=list)
    """Of the answer's tokens"""
    scores: Scores | None = None
    """Of as many of the prompt's as are read, if they are wished and still to be told"""
    handover: "Handover | None" = None
    """What another engine has read of it, until it has a row here"""

    @property
    def answered(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def is_scored(self) -> bool:
        """Whether what is read of it now is told of."""
        return self.request.prompt_logprobs and not self.answered

    @property
    def unread(self) -> int:
        """Tokens to be read before it can go on; the newest of an answer is not among them."""
        return len(self.tokens) - (self.answered > 0) - self.read

    def score(self, count: int, scores: "ReadScores", place: int) -> None:
        """Each of the next `count` tokens that are read tells of the prompt's token behind it."""
        count = min(count, len(self.request.prompt) - 1 - self.read)
        self.scores.logprobs += scores.logprob_BT[place, :count].tolist()
        self.scores.top += pairs(
            scores.top_BTn[place, :count], scores.top_logprob_BTn[place, :count]
        )

    def take(self, tokens: Sequence[int]) -> tuple[int, Ended | None]:
        """Adds tokens as far as the text goes: how many, and what ended it."""
        for count, token in enumerate(tokens, start=1):
            self.tokens.append(int(token))
            if token in self.request.end_ids:
                return count, "stop"
            if len(self.tokens) >= self.limit:
                return count, "length"
        return len(tokens), None
