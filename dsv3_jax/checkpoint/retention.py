"""Which checkpoints stay when a new one has been committed: the rule alone, without a disk."""

from collections.abc import Collection
from typing import NamedTuple


class Retention(NamedTuple):
    """The newest `last` checkpoints stay, and those of every `every` steps; by default all."""

    last: int = 0
    """0: all stay, whatever else is said"""
    every: int = 0
    """0: none but the newest"""
    regular: int = 1
    """Steps between the checkpoints of an undisturbed run. The newest of these stays, too: a run
    that goes back after a spike goes back there, whatever a signal has left since."""
    first: bool = False
    """Step 0 stays: the weights that the run began with"""

    def kept(self, steps: Collection[int], written: int) -> set[int]:
        """Those of `steps` that stay now that step `written`, one of them, has been committed."""
        if not self.last:
            return set(steps)
        kept = {written, *sorted(steps)[-self.last :]}
        kept |= {0} & set(steps) if self.first else set()
        kept |= {step for step in steps if self.every and step and step % self.every == 0}
        regular = [step for step in steps if step and step % self.regular == 0]
        return kept | {max(regular)} if regular else kept


KEEP_ALL = Retention()
