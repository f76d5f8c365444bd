"""Several processes of a command on one machine: started, watched, ended together.

Each is the same command line once more, in a session of its own, told by its environment which one
it is. Only process 0's output is seen; what others print on stderr is shown if they are to blame.
Signals go to all of them. When one dies, the others are killed at once, since they would wait for
it; they end as well if this process does, whose end closes a pipe that each of them reads.

On a cluster JAX finds the processes and notices a death by itself (`processes.py`): nothing of this
runs there.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from dsv3_jax.cli import USER_ERROR, to_stderr
from dsv3_jax.process import MAX_EMULATED

MAX_PROCESSES = 256
PLACE = "DSV3_PROCESS"  # index, count, address, lifeline, report
TOGETHER_SECONDS = 10  # after a mistake or bad steps all end by themselves
JOINT_CODES = (USER_ERROR, 3)  # a mistake, or too many bad steps
MOMENT_SECONDS = 3
STOP_SECONDS = 600  # after a signal, of which the first process may be the last to have saved
_POLL_SECONDS = 0.05
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class LaunchOptions:
    """In how many processes a run computes, and who starts them."""

    processes: int = 1
    """Start so many here, each with its share of --devices (by default those of mesh)"""
    port: int = 0
    """Where process 0 listens for the others; 0 takes a free one"""
    cluster: bool = False
    """This is one of a cluster's processes: JAX finds the others (SLURM, JobSet, TPU pod)"""
    hang_seconds: float = 0.0
    """Say so if a step takes longer; 0: 20 times the usual step, at least 2 minutes"""


class Started:
    """What the launcher told this process; ends it when the launcher ends."""

    def __init__(self, told: str) -> None:
        index, count, address, lifeline, self._report = told.split()
        self.place = int(index), int(count), address
        self.count = int(count)
        threading.Thread(target=_end_with, args=(int(lifeline),), daemon=True).start()

    def tell_run(self, path: Path) -> None:
        """Where the run is that somebody may have to resume."""
        os.write(int(self._report), os.fsencode(path))


def started() -> Started | None:
    """None if no launcher started this process."""
    told = os.environ.pop(PLACE, "")
    return Started(told) if told else None


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """What goes wrong in here ends this process of several without JAX's farewell, which waits for
    all of them. A failure waits for a moment first: if another process is the cause, its death ends
    this one, whose complaint nobody needs.
    """
    try:
        yield
    except SystemExit as end:
        _leave(end.code if isinstance(end.code, int) else 1)
    except KeyboardInterrupt:  # `cli.run` leaves at once
        raise
    except BrokenPipeError:  # the reader of our output left
        os._exit(128 + signal.SIGPIPE)
    except BaseException:
        text = traceback.format_exc()
        time.sleep(MOMENT_SECONDS)
        sys.stderr.write(text)
        _leave(1)


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def _end_with(lifeline: int) -> None:
    os.read(lifeline, 1)  # returns when the launcher is gone
    os.kill(os.getpid(), signal.SIGKILL)


def check(options: LaunchOptions, devices: int | None, mesh_size: int) -> None:
    """ValueError for processes, devices and port that cannot be."""
    processes, port = options.processes, options.port
    if not 1 <= processes <= MAX_PROCESSES:
        raise ValueError(f"launch.processes is {processes}; allowed: 1 to {MAX_PROCESSES}")
    if not options.hang_seconds >= 0:
        raise ValueError(f"launch.hang_seconds is {options.hang_seconds}; allowed: 0 or more")
    if not 0 <= port < 2**16:
        raise ValueError(f"launch.port is {port}; allowed: 0 to 65,535")
    if options.cluster and processes > 1:
        raise ValueError("launch.cluster and launch.processes: allowed: one of them")
    if processes == 1:
        return
    if devices is not None and devices != mesh_size:
        raise ValueError(
            f"--devices is {devices}, and the axes of mesh multiply to {mesh_size}; allowed with "
            "launch.processes: the same number"
        )
    if mesh_size % processes:
        raise ValueError(
            f"launch.processes is {processes}, which does not divide the {mesh_size} devices of "
            "the mesh"
        )
    if mesh_size > processes * MAX_EMULATED:
        raise ValueError(
            f"launch.processes is {processes}, and the axes of mesh multiply to {mesh_size:,}; "
            f"allowed: up to {MAX_EMULATED:,} emulated devices in a process"
        )


def run(options: LaunchOptions) -> int:
    """Runs this command in so many processes. Returns its exit code, that of whichever process
    decides it. ValueError if the port is taken.
    """
    job = _Job(options.processes, f"127.0.0.1:{_port(options.port)}")
    with job.forwarding_signals():
        try:
            job.start()
            return job.wait()
        finally:
            job.kill()
            job.close()


def _port(wanted: int) -> int:
    """A free port."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise ValueError(
                f"launch.port is {wanted}: {error.strerror}; allowed: a free port, or 0"
            ) from error
        return listening.getsockname()[1]


class _Job:
    """The processes of one command."""

    def __init__(self, count: int, address: str) -> None:
        self.count, self.address = count, address
        self.children: list[subprocess.Popen] = []
        self.errors: list[IO[bytes] | None] = []
        self.signals: list[int] = []
        self.report, self.reports = os.pipe()
        self.lifeline, self.life = os.pipe()

    def start(self) -> None:
        """Starts them all."""
        command = [sys.executable, *sys.orig_argv[1:]]
        for index in range(self.count):
            place = f"{index} {self.count} {self.address} {self.lifeline} {self.reports}"
            self.errors.append(tempfile.TemporaryFile() if index else None)  # noqa: SIM115
            self.children.append(
                subprocess.Popen(
                    command,
                    env=os.environ | {PLACE: place},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL if index else None,
                    stderr=self.errors[-1],
                    pass_fds=(self.lifeline, self.reports),
                    start_new_session=True,  # a terminal's ^C comes through us alone, once
                )
            )
        os.close(self.reports)

    @contextlib.contextmanager
    def forwarding_signals(self) -> Iterator[None]:
        """What this process is sent goes to all."""
        heard = [n for n in _SIGNALS if signal.getsignal(n) != signal.SIG_IGN]
        before = {n: signal.signal(n, self._forward) for n in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _forward(self, number: int, frame: Any) -> None:
        self.signals.append(number)
        for child in self.children:
            if child.poll() is None:
                child.send_signal(number)

    def wait(self) -> int:
        """Until all have ended, or one has died. Returns the exit code."""
        since, blamed = 0.0, -1
        while True:
            codes = [child.poll() for child in self.children]
            failed = [i for i, code in enumerate(codes) if code]
            if None not in codes and not failed:
                return 0
            if failed:
                since = since or time.monotonic()
                blamed = min(failed, key=lambda i: (_blame(codes[i]), i)) if blamed < 0 else blamed
                late = time.monotonic() - since > self._patience()
                if late or None not in codes or not self._end_together(codes[blamed]):
                    return self._told(blamed, codes)
            time.sleep(_POLL_SECONDS)

    def _end_together(self, code: int) -> bool:
        """Whether all processes come to such an end by themselves."""
        return code in JOINT_CODES or self._stopped(code)

    def _stopped(self, code: int) -> bool:
        """Whether a process ended as signals end one; after a second one, in any way."""
        return code > 128 or -code in self.signals or len(self.signals) > 1

    def _patience(self) -> float:
        """Short after a second signal, which asks to leave at once."""
        return (TOGETHER_SECONDS, STOP_SECONDS, MOMENT_SECONDS)[min(len(self.signals), 2)]

    def _told(self, blamed: int, codes: Sequence[int | None]) -> int:
        """Ends the others, says what they could not say, and returns the exit code."""
        self.kill()
        code = codes[blamed]
        if self.signals and self._stopped(code):
            return 128 + self.signals[0]
        if codes[0] == code and code > 0 and self._end_together(code):
            return code  # the first process has said it
        said = self._said_by(blamed)
        if code == USER_ERROR:
            to_stderr(f"{said[-1] if said else 'error'} (process {blamed} of {self.count})")
            return code
        for line in said[-30:]:
            to_stderr(f"process {blamed}: {line}")
        end = f"ended with exit code {code}" if code > 0 else f"was ended by {_name(-code)}"
        run = os.fsdecode(os.read(self.report, 4096))  # they are gone: an end, if not a name
        go_on = f"go on with --resume {run}" if run else "the run had not begun"
        to_stderr(
            f"error: process {blamed} of {self.count} {end}; the others were stopped; {go_on}"
        )
        return code if code > 0 else 128 - code

    def _said_by(self, index: int) -> list[str]:
        """Lines of a process's stderr that were not seen."""
        file = self.errors[index]
        if file is None:
            return []
        file.seek(0)
        return file.read().decode(errors="replace").splitlines()

    def kill(self) -> None:
        """Ends those that still run, at once, and waits for them."""
        for child in self.children:
            child.kill()
        for child in self.children:
            child.wait()

    def close(self) -> None:
        """Gives back what the system lent."""
        for descriptor in (self.report, self.lifeline, self.life):
            os.close(descriptor)
        for file in self.errors:
            if file:
                file.close()


def _blame(code: int) -> int:
    """Who was killed comes before who failed, and both before who was aborted: JAX does that to
    whoever has lost the others.
    """
    if code == -signal.SIGABRT:
        return 2
    return int(code > 0)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
