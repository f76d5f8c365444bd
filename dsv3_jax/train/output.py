"""Where a run's records go: its log, the display, and other writers."""

from collections.abc import Sequence
from typing import Any

from dsv3_jax.train.metrics import MetricsLog, Progress
from dsv3_jax.train.writers import Writer


class Output:
    """One place to tell; without a log, as in all processes but the first, nothing is kept."""

    def __init__(
        self, log: MetricsLog | None, progress: Progress, writers: Sequence[Writer] = ()
    ) -> None:
        self.log, self.progress, self.writers = log, progress, writers

    def keep(self, record: dict[str, Any]) -> None:
        """For the files only. A full disk is told: the file takes what it missed once it can."""
        if self.log is None:
            return
        try:
            self.log.append(record)
        except OSError as error:
            self.message(f"metrics.jsonl not written: {error.strerror}")
        for writer in self.writers:
            writer.write(record)

    def step(self, record: dict[str, Any], logged: bool) -> None:
        """A step's record. Those between the logged ones are for the live display only."""
        if logged:
            self.keep(record)
        if logged or self.progress.live:
            self.progress.update(record)

    def validation(self, record: dict[str, Any]) -> None:
        self.keep(record)
        self.progress.update(record)

    def event(self, record: dict[str, Any]) -> None:
        """Kept, and told at once."""
        self.keep(record)
        self.message(f"{record['event']}: {record['text']}")

    def close(self) -> None:
        """Of the other writers; the log belongs to whoever opened it."""
        for writer in self.writers:
            writer.close()

    def message(self, text: str) -> None:
        self.progress.message(text)
