"""A server in a process of its own, which ends with the one that started it.

Needs Linux. Imports nothing but the standard library.
"""

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

STARTING = 900.0  # seconds in which a server must be there, compilation included
_PLACE = re.compile(r"(?:serving|running on) .*?http://([\w.]+):(\d+)")
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


class ServerProcess:
    """Attributes: host, port, and `pid` of the process."""

    def __init__(self, process: subprocess.Popen, host: str, port: int) -> None:
        self._process, self.host, self.port, self.pid = process, host, port, process.pid

    def cpu_seconds(self) -> float:
        """That it has taken of all processors so far."""
        # The second field is its name in brackets, which may hold anything.
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def started(command: Sequence[str]) -> Iterator[ServerProcess]:
    """A server that says on stderr where it is, once it takes connections; killed at the end.

    SystemExit with its last words if it ends before that.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "stderr")
        with said.open("w") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                preexec_fn=_end_with_parent,
            )
        try:
            yield ServerProcess(process, *_place(process, said))
        finally:
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    """Contenders are killed, which leaves them no time to end what they have started."""
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)


def _place(process: subprocess.Popen, said: Path) -> tuple[str, int]:
    end = time.monotonic() + STARTING
    while process.poll() is None:
        text = said.read_text(errors="replace")
        if match := _PLACE.search(text):
            host, port = match[1], int(match[2])
            if _takes_connections(host, port):
                return host, port
        if time.monotonic() > end:
            raise SystemExit(f"no server after {STARTING:.0f} s")
        time.sleep(0.1)
    lines = said.read_text(errors="replace").strip().splitlines()
    raise SystemExit(lines[-1] if lines else f"exit {process.returncode}")


def _takes_connections(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False
