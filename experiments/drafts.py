"""What becomes of MTP drafts along a text (report 5.4.3): each is taken with a probability that the
text and the model tell, so the expected counts of all steps follow without an engine.

The engine's MTP modules read the text that was taken, whatever had been drafted, so their drafts
come out of one forward pass over the finished text. A greedy draft is the token that was taken, or
is not. A drawn one is token x and accepted with probability min(p(x), q(x)), p being the main
model's distribution and q the module's; x was taken with p(x) in all, so of the cases that led to
this text a share of min(1, q(x) / p(x)) took the draft.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.model.transformer import DeepSeekV3


class Counts(NamedTuple):
    """Of decoding steps, expected ones: how many, the tokens that they made, and of the first,
    second ... drafts how many were looked at, which is when all before them were taken, and taken.
    """

    steps: float
    tokens: int
    looked_at_D: np.ndarray
    taken_D: np.ndarray

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps

    @property
    def acceptance_D(self) -> np.ndarray:
        """Of the drafts looked at, the share that was taken; NaN where there were none."""
        nothing_D = np.full_like(self.taken_D, np.nan)
        return np.divide(self.taken_D, self.looked_at_D, nothing_D, where=self.looked_at_D > 0)


def together(counts: Sequence[Counts]) -> Counts:
    """Of several lots of texts."""
    return Counts(*(sum(column) for column in zip(*counts, strict=True)))


def chances(model: DeepSeekV3, text_BT: np.ndarray, prompt: int, *, greedy: bool) -> np.ndarray:
    """Probability that a draft is the token taken, float [B, N, D]: of the first, second ... draft
    of a step that begins with so many tokens of the N after the prompt there, provided that those
    before it are. Without `greedy` for texts at temperature 1.

    N is one less than the new tokens: no step begins with the last.
    """
    graphdef, state = nnx.split(model)
    found_BTD = np.asarray(_chances(graphdef, state, jnp.asarray(text_BT), greedy), np.float64)
    return found_BTD[:, prompt - 1 : text_BT.shape[1] - 2]


@partial(jax.jit, static_argnums=0)
def _chances(
    graphdef: nnx.GraphDef, state: nnx.State, text_BT: jax.Array, greedy: jax.Array
) -> jax.Array:
    """[B, T, D]: by the position that MTP modules draft from; 0 where the text has ended."""
    model, length = nnx.merge(graphdef, state), text_BT.shape[1]
    h_BTD, _ = model.hidden(text_BT)
    p_BTV = jax.nn.log_softmax(model.logits(h_BTD), axis=-1)
    found = []
    for k, (deeper_BTD, _) in enumerate(model.mtp_hidden(h_BTD, text_BT), start=1):
        q_BtV = jax.nn.log_softmax(model.logits(deeper_BTD)[:, : length - k - 1], axis=-1)
        token_Bt = text_BT[:, k + 1 :]
        # What the main model says of the same token, from k positions further on.
        p_Bt, q_Bt = (
            jnp.take_along_axis(x_BtV, token_Bt[..., None], axis=-1)[..., 0]
            for x_BtV in (p_BTV[:, k : length - 1], q_BtV)
        )
        drawn_Bt = jnp.exp(jnp.minimum(q_Bt - p_Bt, 0))
        chance_Bt = jnp.where(greedy, q_BtV.argmax(-1) == token_Bt, drawn_Bt)
        found.append(jnp.pad(chance_Bt, ((0, 0), (0, k + 1))))
    return jnp.stack(found, axis=-1)


def replayed(chance_BND: np.ndarray) -> Counts:
    """The steps that make B texts of N tokens after a first one, which the prompt's reading made.

    A step makes the drafts that are taken and one token more; near the end it looks at no draft
    that would leave no room for that one.
    """
    rows, places, drafts = chance_BND.shape
    begins_Bn = np.zeros((rows, places + 1))  # the probability that a step begins there
    begins_Bn[:, 0] = 1
    looked_at_D, taken_D = np.zeros(drafts), np.zeros(drafts)
    for place in range(places):
        alive_B = begins_Bn[:, place]
        allowed = min(drafts, places - 1 - place)
        for k in range(allowed):
            taken_B = alive_B * chance_BND[:, place, k]
            begins_Bn[:, place + k + 1] += alive_B - taken_B
            looked_at_D[k] += alive_B.sum()
            taken_D[k] += taken_B.sum()
            alive_B = taken_B
        begins_Bn[:, place + allowed + 1] += alive_B
    return Counts(float(begins_Bn[:, :places].sum()), rows * places, looked_at_D, taken_D)
