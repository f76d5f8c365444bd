"""Saving beside the training: `store.save` in a thread of its own, one save at a time; in several
processes `joint.save`, in a thread of each.

The caller hands over arrays and goes on; the thread writes, commits, and then deletes what
`Retention` lets go of. It deletes only after the commit, so a folder that held a whole checkpoint
holds one at every moment, and `store.clean` removes whatever a kill leaves.

Only the caller's thread raises. What went wrong is raised by the next `wait` or `start`, once.
"""

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.checkpoint import joint, store
from dsv3_jax.checkpoint.arrays import CheckpointError
from dsv3_jax.checkpoint.parts import Piece
from dsv3_jax.checkpoint.retention import KEEP_ALL, Retention
from dsv3_jax.parallel import processes

Arrays = Mapping[str, Mapping[str, np.ndarray | Sequence[Piece]]]


class Saver:
    """The one writer of a folder of checkpoints."""

    def __init__(
        self, folder: Path, retention: Retention = KEEP_ALL, loaded: int | None = None
    ) -> None:
        """`loaded`: the newest step that could be read from the folder, 0 if none could; the later
        ones are damaged and count for nothing. None: nobody tried, and all count.
        """
        self.folder, self._retention = folder, retention
        self.committed = loaded or None
        """The step that was saved last, or loaded"""
        self.undeleted = ""
        """What was to be deleted and could not be, in one line"""
        self._damaged: set[int] = set()
        if loaded is not None:
            self._damaged = {step for step in store.steps(folder) if step > loaded}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is in flight. If not, `wait` returns or raises at once."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, step: int, arrays: Arrays, meta: dict[str, Any]) -> None:
        """Saves in the background, as `store.save` or `joint.save` does, once the save before has
        ended.

        Nobody may write to the arrays until this one has ended: no view of a buffer that is
        donated to a later program. Raises what `wait` raises; nothing is then started.
        """
        self.wait()
        work = threading.Thread(target=self._work, args=(step, arrays, meta), name="checkpoint")
        work.start()
        self._thread = work

    def wait(self) -> None:
        """Returns once nothing is in flight.

        Raises what the save raised, if it failed: `CheckpointError` with the checkpoint that is
        the newest all the same.
        """
        self._join()
        error, self._error = self._error, None
        if isinstance(error, CheckpointError):
            raise CheckpointError(f"{error}; {self.newest()}") from error
        if error is not None:
            raise error

    def steps(self) -> list[int]:
        """Returns the committed steps in ascending order, without those known to be damaged;
        waits for a save in flight, but does not raise what it raised.
        """
        self._join()
        return self._usable()

    def newest(self) -> str:
        """Half a sentence about the newest of `steps`."""
        steps = self.steps()
        return f"the newest checkpoint is of step {steps[-1]}" if steps else "no checkpoint yet"

    def disown(self, step: int) -> None:
        """From now on a step counts for nothing: it could not be read."""
        self._damaged.add(step)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _work(self, step: int, arrays: Arrays, meta: dict[str, Any]) -> None:
        try:
            if processes.count() > 1:
                joint.save(self.folder, step, arrays, meta, after=partial(self._after, step))
            else:
                store.save(self.folder, step, arrays, meta)
                self._after(step)
            self.committed = step
        except BaseException as error:  # told by the caller's thread
            self._error = error

    def _after(self, written: int) -> None:
        """Deletes what need not stay. Where that fails the checkpoint is there all the same."""
        self._damaged.discard(written)
        self.committed = written
        try:
            usable = set(self._usable())
            kept = self._retention.kept(usable, written)
            gone = usable - kept | (self._damaged if self._retention.last else set())
            for step in sorted(gone):
                store.delete(self.folder, step)
                self._damaged.discard(step)
        except CheckpointError as error:
            self.undeleted = str(error)

    def _usable(self) -> list[int]:
        return [step for step in store.steps(self.folder) if step not in self._damaged]
