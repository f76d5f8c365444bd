"""A trace of some steps, for xprof, TensorBoard and Perfetto."""

import re
from pathlib import Path
from typing import Any, Self

import jax


class Profile:
    """Traces steps `first` to `last` (counted from 1, both included) into `folder`."""

    def __init__(self, first: int, last: int, folder: Path) -> None:
        self._first, self._last, self._folder = first, last, folder
        self._running = False

    @classmethod
    def none(cls) -> Self:
        return cls(0, 0, Path())

    def before(self, step: int) -> None:
        """A step is about to start."""
        if step == self._first and not self._running:  # a run may go back within them
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """A step has been handed to the device; `results` are what it will give."""
        if self._running and step >= self._last:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Ends the trace, if one runs."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


def parse_steps(text: str) -> tuple[int, int]:
    """First and last step of START:STOP. ValueError for anything else."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(
            f"--profile {text}; allowed: START:STOP, steps counted from 1, as in 10:12"
        )
    return first, last
