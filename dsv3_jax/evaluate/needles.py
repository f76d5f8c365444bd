"""Needles in haystacks: one sentence in a long text, and a question that only it answers (report
4.3, Figure 8).

A prompt is put together from token ids and never tokenised as a whole: what is asked is, token for
token, how the needle begins, and a prompt has exactly the length that was wished. The answer is
part of it, so that one pass over the prompt tells whether a model would have written it: greedy
text is the answer if each of its tokens is the likeliest behind those before it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.evaluate.haystack import Haystack

WORDS = (
    "amber anchor badger bitter brave bridge calm candle castle clever deep desert dragon dusty "
    "early ember empty engine faint falcon fancy forest garden gentle grand guitar hammer harbor "
    "hollow humble icy island jacket jolly keen kettle lantern lucky mirror misty narrow needle "
    "olive orchard pale pepper quarry quiet rapid ribbon saddle silver temple tidy umbrella urban "
    "valley velvet wagon windy yard young zebra zesty"
).split()
VALUE = 3  # words of an answer: a guess among 64 words is right once in 250,000


class Sentence(NamedTuple):
    """A needle in its three parts; the question is `beginning` alone, the answer is `value`."""

    beginning: str
    value: str
    ending: str

    @property
    def text(self) -> str:
        return "".join(self)


class Prompt(NamedTuple):
    """One question to a model."""

    tokens_T: np.ndarray
    """Begin of sentence, text with the needle, question, answer; int32 [T]"""
    answer: int
    """Tokens of the answer, the last ones"""
    needle: slice
    """Where the needle stands"""
    sentence: Sentence


class Place(NamedTuple):
    """A cell of the map: where needles stand in prompts of one length."""

    length: int
    """Tokens of a prompt, answer included"""
    depth: float
    """Share of the text that is before the needle, 0 to 1"""


def draw_sentence(rng: np.random.Generator) -> Sentence:
    """A needle with a word as its key and `VALUE` others as its value.

    Words stand behind spaces, which tokenizers take into a word's first token: a question ends, and
    an answer begins, where a token does in running text.
    """
    key, *value = rng.choice(WORDS, 1 + VALUE, replace=False)
    return Sentence(f"\nThe secret words are {key}", f" {' '.join(value)}", ".\n")


def depths_of(count: int) -> list[float]:
    """So many depths, evenly from 0 to 1; the middle, if it is one. ValueError below 1."""
    if count < 1:
        raise ValueError(f"--depths is {count}; allowed: 1 or more")
    return [0.5] if count == 1 else [i / (count - 1) for i in range(count)]


def build_prompts(
    tokenizer: Tokenizer,
    haystack: Haystack,
    place: Place,
    count: int,
    seed: int,
    draw: Callable[[np.random.Generator], Sentence] = draw_sentence,
) -> Iterator[Prompt]:
    """The prompts of a cell. Each has its own needle, and its text begins with another document.

    A cell's prompts are a function of (text, tokenizer, place, seed), whatever other cells there
    are. ValueError for a length without room for needle, question and answer, or beyond the text.
    """
    for number in range(count):
        rng = np.random.default_rng([seed, place.length, round(place.depth * 1e6), number])
        yield _prompt(tokenizer, haystack, place, draw(rng), rng)


def _prompt(
    tokenizer: Tokenizer,
    haystack: Haystack,
    place: Place,
    sentence: Sentence,
    rng: np.random.Generator,
) -> Prompt:
    beginning, value, ending = tokenizer.encode_batch(sentence)
    needle_T = np.concatenate([beginning, value, ending])
    rest = 1 + len(needle_T) + len(beginning) + len(value)  # 1: begin of sentence
    room = place.length - rest
    if room < len(needle_T):
        raise ValueError(
            f"--lengths: {place.length} tokens; allowed: at least {rest + len(needle_T)}, for a "
            f"needle of {len(needle_T)}, question, answer and as much text as needle"
        )
    text_T = haystack.stretch(int(rng.integers(haystack.documents)), room)
    before = round(place.depth * room)
    bos = np.array([tokenizer.bos_id], np.int32)
    parts = (bos, text_T[:before], needle_T, text_T[before:], beginning, value)
    start = 1 + before
    return Prompt(np.concatenate(parts), len(value), slice(start, start + len(needle_T)), sentence)


def places_of(lengths: Iterable[int], depths: Sequence[float]) -> list[Place]:
    """All cells, length by length."""
    return [Place(length, depth) for length in lengths for depth in depths]
