"""Whether a model finds needles: its likeliest tokens and probabilities at the answers' places.

Hidden states go through the head at the answer alone, so that no [T, V] logits exist.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.evaluate.needles import Place, Prompt
from dsv3_jax.model.transformer import DeepSeekV3

# Tokens of a pass: short prompts go side by side, long ones alone.
TOKENS = 4096

# int32 [B, T] and the longest answer's tokens A -> of the last A tokens of each row, whether each
# is the likeliest behind those before it, bool [B, A], and its log-probability in nats [B, A].
Scorer = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


class Score(NamedTuple):
    """Of one prompt, or means over several."""

    exact: float
    """1 if greedy text is the answer"""
    tokens: float
    """Share of the answer's tokens that are the likeliest"""
    logprob: float
    """Mean log-probability of the answer's tokens, in nats"""


class Cell(NamedTuple):
    """A place's mean score over its prompts."""

    place: Place
    prompts: int
    score: Score


def scorer_of(model: DeepSeekV3) -> Scorer:
    """The model on one device, in the dtype of its weights."""
    return lambda tokens_BT, answer: _at_the_end(model, tokens_BT, answer)


@partial(jax.jit, static_argnums=2)
def _at_the_end(
    model: DeepSeekV3, tokens_BT: jax.Array, answer: int
) -> tuple[jax.Array, jax.Array]:
    h_BTD, _ = model.hidden(tokens_BT)
    logits_BAV = model.logits(h_BTD[:, -answer - 1 : -1])
    label_BA = tokens_BT[:, -answer:]
    log_p_BAV = jax.nn.log_softmax(logits_BAV, axis=-1)
    log_p_BA = jnp.take_along_axis(log_p_BAV, label_BA[..., None], axis=-1)[..., 0]
    return logits_BAV.argmax(-1) == label_BA, log_p_BA


def score_prompts(score: Scorer, prompts: Sequence[Prompt]) -> Iterator[Score]:
    """Scores of prompts of one length, in their order, a few at a time.

    All passes have one shape, the last one's free rows repeat a prompt.
    """
    answer = max(prompt.answer for prompt in prompts)
    rows = min(max(TOKENS // len(prompts[0].tokens_T), 1), len(prompts))
    for start in range(0, len(prompts), rows):
        batch = prompts[start : start + rows]
        filled = [*batch, *[batch[0]] * (rows - len(batch))]
        tokens_BT = np.stack([prompt.tokens_T for prompt in filled])
        likeliest_BA, log_p_BA = map(np.asarray, score(tokens_BT, answer))
        for row, prompt in enumerate(batch):
            likeliest_A = likeliest_BA[row, -prompt.answer :]
            log_p = log_p_BA[row, -prompt.answer :].mean(dtype=np.float64)
            yield Score(float(likeliest_A.all()), float(likeliest_A.mean()), float(log_p))


def score_cells(
    score: Scorer, prompts: dict[Place, list[Prompt]], told: Callable[[int], None]
) -> list[Cell]:
    """Every place's scores; `told` hears how many prompts are done."""
    cells, done = [], 0
    for _, group in groupby(prompts, key=lambda place: place.length):
        places = list(group)
        found = []
        for one in score_prompts(score, [p for place in places for p in prompts[place]]):
            found.append(one)
            done += 1
            told(done)
        for place in places:
            count = len(prompts[place])
            cells.append(Cell(place, count, mean_score(found[:count])))
            del found[:count]
    return cells


def mean_score(scores: Sequence[Score]) -> Score:
    """Field by field."""
    return Score(*np.mean(scores, axis=0).tolist())
