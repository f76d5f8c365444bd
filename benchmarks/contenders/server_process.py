"""A server in a process of its own, which ends with the one that started it.

Needs Linux. Imports nothing but the standard library.
"""

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

STARTING = 900.0  # seconds in which a server must be there, compilation included
_PLACE = re.compile(r"(?:serving|running on) .*?http://([\w.]+):(\d+)")
_END = 2**16  # bytes of what a server has said
# Contenders are killed, which leaves them no time to end what they have started: the kernel does,
# by PR_SET_PDEATHSIG of linux/prctl.h, which a process keeps when it becomes the server.
_MORTAL = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"
)


class ServerProcess(NamedTuple):
    """Where it is."""

    host: str
    port: int
    pid: int

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
    with tempfile.TemporaryFile() as said:  # a pipe that nobody reads would block it
        process = subprocess.Popen(
            [sys.executable, "-c", _MORTAL, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
        try:
            yield ServerProcess(*_place(process, said.fileno()), process.pid)
        finally:
            process.kill()
            process.wait()


def _place(process: subprocess.Popen, said: int) -> tuple[str, int]:
    end = time.monotonic() + STARTING
    while process.poll() is None:
        if match := _PLACE.search(_text(said)):
            host, port = match[1], int(match[2])
            if _takes_connections(host, port):
                return host, port
        if time.monotonic() > end:
            raise SystemExit(f"no server after {STARTING:.0f} s")
        time.sleep(0.1)
    lines = _text(said).strip().splitlines()
    raise SystemExit(lines[-1] if lines else f"exit {process.returncode}")


def _text(file: int) -> str:
    """Its end, without a change of the place at which the server goes on."""
    start = max(os.fstat(file).st_size - _END, 0)
    return os.pread(file, _END, start).decode(errors="replace")


def _takes_connections(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False
