"""Where a run's batches come from: rows that were there before it, or what its own weights make."""

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from dsv3_jax.config import RunConfig
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.loader import Batch, batch_at, load
from dsv3_jax.train.snapshot import Position
from dsv3_jax.train.step import TrainState


class Feed(Protocol):
    """What a `Trainer` asks. Rows are counted over the whole run, as in its `Position`."""

    needs_weights: bool
    """Whether a batch depends on the weights before it: no step is then in flight meanwhile"""

    def open(self, consumed_rows: int, sizes: Iterable[int]) -> None:
        """Batches from there on; `sizes` in rows, taken one by one."""

    def batch(
        self, state: TrainState, position: Position, stopped: Callable[[], bool]
    ) -> Batch | None:
        """The next one, on the host: this process's rows. None if the run was `stopped` meanwhile,
        which one that takes long may look for.
        """

    def told(self) -> dict[str, Any]:
        """What the step's record says of it beside all else."""

    def samples(self) -> list[tuple[str, str]]:
        """Prompts and texts of the newest one that are worth reading."""

    def kept(self) -> np.ndarray | None:
        """What a checkpoint must hold to go on with, uint8."""

    def names_of(self, row: int) -> Sequence[str]:
        """What a row was made from."""

    def one(self, row: int) -> Batch:
        """That row alone."""

    def where(self) -> str:
        """What it is at, from any thread."""

    def close(self) -> None:
        """Ends what it has started. It may be opened again."""


class RowFeed:
    """Rows of texts or of samples, read ahead."""

    needs_weights = False

    def __init__(
        self, cfg: RunConfig, corpus: Corpus, own_rows: Callable[[int], Sequence[int]]
    ) -> None:
        self._rows, self._readers, self._own = corpus.train, cfg.data.readers, own_rows
        self._batches: Generator[Batch, None, None] | None = None

    def open(self, consumed_rows: int, sizes: Iterable[int]) -> None:
        self._batches = load(self._rows, consumed_rows, sizes, self._readers, self._own)

    def batch(self, state: TrainState, position: Position, stopped: Callable[[], bool]) -> Batch:
        return next(self._batches)

    def told(self) -> dict[str, Any]:
        return {}

    def samples(self) -> list[tuple[str, str]]:
        return []

    def kept(self) -> np.ndarray | None:
        return None

    def names_of(self, row: int) -> Sequence[str]:
        return self._rows.names_of(row)

    def one(self, row: int) -> Batch:
        return batch_at(self._rows, row, 1)

    def where(self) -> str:
        return "reading rows"

    def close(self) -> None:
        if self._batches:
            self._batches.close()
