"""What an engine's programs take, from the texts that are in their rows; in NumPy."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dsv3_jax.inference.requests import Text
from dsv3_jax.inference.sampling import RowSampling
from dsv3_jax.inference.step import Chunk, Lease


def chunk_of(
    texts: Sequence[Text | None], counts: Mapping[int, int], size: int, drafts: int
) -> Chunk:
    """The next `counts[text.id]` tokens of each text, in chunks of `size`; of nobody none."""
    ahead = drafts + 1
    chunk = Chunk(
        *(np.zeros(len(texts), kind) for kind in (np.int32, bool)),
        np.zeros((len(texts), size + ahead), np.int32),
        *(np.zeros(len(texts), np.int32) for _ in range(3)),
        np.zeros(len(texts), bool),
    )
    for i, text in enumerate(texts):
        if text is None:
            continue
        known = text.tokens[text.read :][: counts[text.id] + ahead]
        chunk.token_Bt[i, : len(known)] = known
        chunk.row_B[i], chunk.first_B[i] = text.row, not text.began
        chunk.start_B[i], chunk.count_B[i] = text.read, counts[text.id]
        chunk.known_B[i], chunk.scored_B[i] = len(known), text.is_scored
    return chunk


def lease_of(texts: Sequence[Text | None], width: int, page_slots: int) -> Lease:
    """Of texts' rows, with tables of `width` pages; of nobody zeros, and no nucleus."""

    def numbers(of: Callable[[Text], Any], kind: Any, nobody: int = 0) -> np.ndarray:
        return np.array([nobody if text is None else of(text) for text in texts], kind)

    how = RowSampling(
        numbers(lambda text: text.request.seed, np.uint32),
        numbers(lambda text: text.request.temperature, np.float32),
        numbers(lambda text: text.request.top_p, np.float32, nobody=1),
    )
    table_BY = np.zeros((len(texts), width), np.int32)
    for pages, text in zip(table_BY, texts, strict=True):
        if text is not None:
            known = text.pages[:width]
            pages[: len(known)] = known
    own_from_B = numbers(lambda text: text.borrowed * page_slots, np.int32)
    return Lease(table_BY, own_from_B, numbers(lambda text: text.limit, np.int32), how)
