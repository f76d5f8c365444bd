"""Fill-in-the-middle: a share of the documents as prefix, suffix, middle (report 4.1).

A document `bos text eos` becomes `bos fim_begin prefix fim_hole suffix fim_end middle eos`. It is
decided anew in each epoch, for whole documents and before packing, by hash of (seed, epoch,
document) alone. The two cuts fall between tokens, not inside them: a document then grows by exactly
three tokens, so where each document of an epoch lies is known without reading any, and documents
that are stored as tokens are served like text. Pieces may be empty. Documents without text stay as
they are.
"""

from dataclasses import dataclass

import numpy as np

from dsv3_jax.data.hashing import WORDS_PER_BLOCK, key64, unit, words
from dsv3_jax.data.tokenizer import FIM_TOKENS, Tokenizer

ADDED = 3
"""Tokens that a document grows by"""


@dataclass(frozen=True)
class Fim:
    """The order's ids, and how many documents take it."""

    rate: float
    """Share of documents, 0 to 1"""
    begin_id: int
    hole_id: int
    end_id: int
    opening: int
    """Ids before a document's text: 1 with a bos, else 0"""

    def cuts(self, lengths: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Where each document of an epoch is cut.

        Args:
            lengths: of the documents with bos and eos, int64 [documents].

        Returns:
            Where middle and suffix start in the document, int64 [documents, 2], bos counted; -1
            where the document stays as it is.
        """
        # Document d takes Philox's block d.
        drawn = words(key64("fim", seed, epoch), WORDS_PER_BLOCK * len(lengths))
        drawn = drawn.reshape(-1, WORDS_PER_BLOCK)
        num_text = np.maximum(lengths - self.opening - 1, 0)
        # Uniform over the num_text + 1 places: the high half of a 32 by 32 bit product.
        places = (num_text + 1).astype(np.uint64)[:, None]
        cuts = ((drawn[:, 1:3] >> np.uint64(32)) * places) >> np.uint64(32)
        cuts = np.sort(cuts.astype(np.int64), axis=1) + self.opening
        takes = (unit(drawn[:, 0]) < self.rate) & (num_text > 0)
        return np.where(takes[:, None], cuts, -1)

    def rearrange(self, ids: np.ndarray, middle: int, suffix: int) -> np.ndarray:
        """A document, int32 [N], with its middle last, int32 [N + 3].

        Args:
            middle: where the middle starts.
            suffix: where the suffix starts.
        """
        begin, hole, end = (np.array([i], ids.dtype) for i in self._ids)
        prefix_and_bos, last = ids[:middle], ids[-1:]
        bos, prefix = prefix_and_bos[: self.opening], prefix_and_bos[self.opening :]
        return np.concatenate(
            [bos, begin, prefix, hole, ids[suffix:-1], end, ids[middle:suffix], last]
        )

    @property
    def _ids(self) -> tuple[int, int, int]:
        return self.begin_id, self.hole_id, self.end_id


def fim_of(tokenizer: Tokenizer, rate: float) -> Fim | None:
    """Fill-in-the-middle in a tokenizer's ids; None at rate 0.

    ValueError if the tokenizer lacks one of the three tokens.
    """
    if rate == 0:
        return None
    ids = [tokenizer.id_of(token) for token in FIM_TOKENS]
    missing = [token for token, id_ in zip(FIM_TOKENS, ids, strict=True) if id_ is None]
    if missing:
        raise ValueError(
            f"data.fim_rate is {rate}, but tokenizer {tokenizer.name} lacks {', '.join(missing)}; "
            "allowed: 0, or a tokenizer with these tokens"
        )
    begin_id, hole_id, end_id = ids
    opening = int(tokenizer.bos_id != tokenizer.eos_id)
    return Fim(rate, begin_id, hole_id, end_id, opening)
