"""A run's checkpoints while it trains: handed over, settled, gone back to."""

import json

from dsv3_jax.checkpoint import joint, store
from dsv3_jax.checkpoint.arrays import CheckpointError
from dsv3_jax.checkpoint.retention import Retention
from dsv3_jax.checkpoint.saver import Saver
from dsv3_jax.config import RunConfig
from dsv3_jax.parallel import processes
from dsv3_jax.train.folder import RunFolder
from dsv3_jax.train.output import Output
from dsv3_jax.train.records import event_record
from dsv3_jax.train.snapshot import Position, Snapshot, contents


class Checkpoints:
    """Of one run. Saves on the way are in the background, and their failures are told and
    survived; whoever needs the newest one waits for it.
    """

    def __init__(
        self,
        cfg: RunConfig,
        run: RunFolder,
        data: dict[str, str],
        start: Position,
        wanted: store.Wanted | None = None,
    ) -> None:
        """`data` identifies tokenizer and documents; the run goes on from `start`. `wanted`: what
        this process needs of a checkpoint.
        """
        self.cfg, self.data, self.folder, self._wanted = cfg, data, run.checkpoints, wanted
        output = cfg.output
        first = cfg.data.format == "prompts"  # from which the divergence is measured
        retention = Retention(output.keep_last, output.keep_every, output.save_every, first)
        self._saver = Saver(run.checkpoints, retention, loaded=start.step)
        self._handed_over = start

    def hand_over(self, snapshot: Snapshot, out: Output) -> None:
        """Saves in the background. Training stands still for a copy of the state alone."""
        self.settle(out)
        self._start(snapshot)

    def save(self, snapshot: Snapshot) -> None:
        """Saves and waits. CheckpointError if it, or the one before it, failed."""
        self._start(snapshot)
        self._saver.wait()

    def finish(self, snapshot: Snapshot, out: Output) -> None:
        """Returns once the run's last state is saved. CheckpointError if it cannot be."""
        self.settle(out)
        if self._saver.committed != snapshot.position.step:
            self.save(snapshot)

    def settle(self, out: Output) -> None:
        """Waits for a save in flight, and tells if it failed: a full disk, for one, is no reason
        to end training, since the weights are still here.
        """
        try:
            self._saver.wait()
        except CheckpointError as error:
            self._tell(out, "not saved", f"{error}; training goes on")
        if self._saver.undeleted:
            self._tell(out, "not deleted", self._saver.undeleted)
            self._saver.undeleted = ""

    def close(self) -> None:
        """Waits for a save in flight, whatever comes of it."""
        self._saver.steps()

    def look(self, out: Output) -> None:
        """Settles what has ended; does not wait."""
        if not self._saver.busy:
            self.settle(out)

    def newest(self) -> str:
        """Half a sentence about the newest one."""
        return self._saver.newest()

    def newest_regular(self, out: Output) -> store.Checkpoint | None:
        """Reads the newest one that an undisturbed run would have, if there is any; one that
        cannot be read is told and passed over.
        """
        self.settle(out)
        steps = json.loads(processes.of_first("rewind", lambda: json.dumps(self._saver.steps())))
        for step in reversed(steps):
            if step and step % self.cfg.output.save_every == 0:
                try:
                    checkpoint = joint.load(self.folder, step, wanted=self._wanted)
                except CheckpointError as error:
                    self._saver.disown(step)
                    out.message(f"checkpoint skipped: {error}")
                    continue
                self._saver.committed = step  # later ones are of a past that is given up
                return checkpoint
        return None

    def _start(self, snapshot: Snapshot) -> None:
        self._handed_over = snapshot.position
        self._saver.start(snapshot.position.step, *contents(self.cfg, snapshot, self.data))

    def _tell(self, out: Output, event: str, text: str) -> None:
        out.event(event_record(self.cfg, self._handed_over, event, text))
