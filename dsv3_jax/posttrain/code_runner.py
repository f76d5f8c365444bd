"""Runs a Python program that a model has written, inside a box where the system has one.

The limits (`Limits`) hold always. A box besides keeps the program from the network, from all files
but the system's and its own, and from other processes; README says what that leaves. Where no box
works, programs are refused, unless the user takes the risk by `--unsafe-local-exec`.
"""

import contextlib
import json
import os
import re
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import IO, Any

from dsv3_jax.config.fields import check
from dsv3_jax.posttrain import containment
from dsv3_jax.posttrain.containment import BOXES, FOLDER, Box
from dsv3_jax.posttrain.sandbox.limits import Limits

_GRACE = 5.0  # seconds that a keeper may take beyond its program's, to start and to end it
_TOLD = 4096  # most bytes that a program may tell beside its output


@dataclass(frozen=True)
class Program:
    """What is run, by the interpreter below this one's virtual environment: the standard library is
    there, installed packages are not (`-I -S`).
    """

    arguments: Sequence[str]
    """Of the interpreter, as in ("main.py",)"""
    files: Mapping[str, str] = field(default_factory=dict)
    """In its folder, by name"""
    stdin: str = ""
    handed: str | None = None
    """A text that it alone reads, on a descriptor whose number is the last but one argument; the
    last one is the number of a descriptor on which it may tell something that is no output"""


@dataclass(frozen=True)
class Ran:
    """How it ended. One of `code`, `signal` and `limit` is there."""

    code: int | None
    signal: int | None
    limit: str | None
    """A field of Limits"""
    output: str
    errors: str
    told: bytes
    seconds: float

    @property
    def trouble(self) -> str:
        """Why it did not end well, in a line; empty if it did."""
        if self.limit is not None:
            return _LIMITS[self.limit]
        if self.signal is not None:
            return "used up its CPU time" if self.signal == signal.SIGXCPU else _named(self.signal)
        if self.code:
            lines = [line for line in self.errors.splitlines() if line.strip()]
            places = re.findall(r'File "(?:\S*/)?(\w+\.py)", line (\d+)', self.errors)
            place = f"{places[-1][0]} line {places[-1][1]}: " if places else ""
            return f"{place}{lines[-1].strip() if lines else f'exit code {self.code}'}"[:300]
        return ""


_LIMITS = {
    "seconds": "took longer than it may",
    "memory_bytes": "used more memory than it may",
    "output_bytes": "printed more than it may",
}


def _named(number: int) -> str:
    try:
        return f"was ended by {signal.Signals(number).name}"
    except ValueError:
        return f"was ended by signal {number}"


class NoBox(ValueError):
    """Programs of a model are refused here: one line, with the reasons."""


@dataclass(frozen=True)
class Runner:
    """Where programs run."""

    box: Box | None
    limits: Limits = field(default_factory=Limits)

    @classmethod
    def open(cls, limits: Limits | None = None, unsafe_local_exec: bool = False) -> "Runner":
        """In the first box that works here; tried once a process. NoBox where none does, unless
        `unsafe_local_exec`. ValueError for limits that cannot be.
        """
        limits = limits or Limits()
        check_limits(limits)
        box, reasons = find_box()
        if box is None and not unsafe_local_exec:
            raise NoBox(
                "running generated code is refused: no box works here "
                f"({'; '.join(f'{name}: {why}' for name, why in reasons.items())}); allowed: a "
                "system with bubblewrap or user namespaces, or --unsafe-local-exec"
            )
        return cls(box, limits)

    def run(self, program: Program) -> Ran:
        """Of any program. OSError if it cannot be started."""
        with contextlib.ExitStack() as stack:
            folder = FOLDER
            if self.box is None:
                folder = tempfile.mkdtemp(prefix="dsv3_code_")
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
            return _run(program, self.box, self.limits, folder, stack)


def check_limits(limits: Limits) -> None:
    """ValueError, one line, for a limit that cannot be."""
    for name, value in limits._asdict().items():
        whole = name == "seconds" or type(value) is int
        check(f"limits.{name}", value, whole and 0 < value < 2**40, "above 0, below 2^40")


@cache
def find_box() -> tuple[Box | None, dict[str, str]]:
    """The first that works, and why others do not. A box works if a trial program, run in it,
    finds itself contained.
    """
    reasons: dict[str, str] = {}
    for box in BOXES:
        why = containment.unavailable(box) or _trial(box)
        if why is None:
            return box, reasons
        reasons[box] = why
    return None, reasons


def _trial(box: Box) -> str | None:
    try:
        ran = Runner(box, Limits()).run(Program(("-c", _TRIAL)))
    except OSError as error:
        return " ".join(str(error).split())[:200]
    if ran.output == "contained\n":
        return None
    return (ran.trouble or ran.output).strip() or "the trial program did not run"


_TRIAL = """
import os, socket
def refused(what, *arguments):
    try:
        what(*arguments)
    except OSError:
        return True
    return False
wrong = [
    name for name, holds in {
        "it has another user": os.getuid() == 1,
        "it sees other processes": os.getppid() == 1,
        "it can open sockets": refused(socket.socket, socket.AF_INET),
        "it can write outside its folder": refused(open, "/trial", "w"),
        "it can read other files": not os.path.exists("/etc/passwd"),
        "it cannot write in its folder": not refused(open, "trial", "w"),
    }.items() if not holds
]
print(", ".join(wrong) or "contained")
"""


# --- one run -------------------------------------------------------------------------------------


def _run(
    program: Program, box: Box | None, limits: Limits, folder: str, stack: contextlib.ExitStack
) -> Ran:
    files = stack.enter_context(_file(json.dumps(dict(program.files))))
    stdin = stack.enter_context(_file(program.stdin))
    passed, arguments = [files.fileno()], list(program.arguments)
    status, status_end = _pipe(stack)
    told, told_end = _pipe(stack)
    passed.append(status_end.fileno())
    if program.handed is not None:
        handed = stack.enter_context(_file(program.handed))
        arguments += [str(handed.fileno()), str(told_end.fileno())]
        passed += [handed.fileno(), told_end.fileno()]
    settings = {
        "limits": limits._asdict(),
        "status": status_end.fileno(),
        "files": files.fileno(),
        "folder": folder,
        "shown": containment.shown() if box == "namespaces" else [],
        "argv": [containment.python(), "-I", "-S", "-B", *arguments],
        "environment": dict(containment.environment(folder)),
    }
    began = time.monotonic()
    process = subprocess.Popen(
        containment.command(box, limits, json.dumps(settings)),
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=passed,
        env={},
        cwd="/",
        start_new_session=True,
    )
    try:
        status_end.close()
        told_end.close()
        texts = _read(process, status, told, limits, began)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdout, process.stderr):
            stream.close()
    return _ran(texts, time.monotonic() - began)


@contextlib.contextmanager
def _file(text: str) -> Iterator[IO[bytes]]:
    """A file that holds it, to be read alone; it has no name any more."""
    descriptor, name = tempfile.mkstemp(prefix="dsv3_code_")
    try:
        with os.fdopen(descriptor, "wb") as written:
            written.write(text.encode(errors="replace"))
        file = open(name, "rb", buffering=0)  # noqa: SIM115
    finally:
        os.unlink(name)
    with file:
        yield file


def _pipe(stack: contextlib.ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    read, write = os.pipe()
    return tuple(
        stack.enter_context(os.fdopen(end, mode, buffering=0))
        for end, mode in ((read, "rb"), (write, "wb"))
    )


def _read(
    process: subprocess.Popen, status: IO[bytes], told: IO[bytes], limits: Limits, began: float
) -> dict[str, bytes]:
    """All that comes, until the pipes close; `limit` is there if it is we who had enough."""
    texts = {"output": b"", "errors": b"", "status": b"", "told": b"", "limit": b""}
    end = began + limits.seconds + _GRACE
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, "output")
        selector.register(process.stderr, selectors.EVENT_READ, "errors")
        selector.register(status, selectors.EVENT_READ, "status")
        selector.register(told, selectors.EVENT_READ, "told")
        while selector.get_map() and not texts["limit"]:
            left = end - time.monotonic()
            if left <= 0:
                texts["limit"] = b"seconds"
            for key, _ in selector.select(max(left, 0)):
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fileobj)
                texts[key.data] += data
            if len(texts["output"]) + len(texts["errors"]) > limits.output_bytes:
                texts["limit"] = b"output_bytes"
            if len(texts["told"]) > _TOLD:
                texts["limit"] = b"output_bytes"
    status.close()  # tells a keeper that it may end all
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)
    most = limits.output_bytes
    return texts | {name: texts[name][:most] for name in ("output", "errors")}


def _ran(texts: Mapping[str, bytes], seconds: float) -> Ran:
    ended: dict[str, Any] = {"limit": texts["limit"].decode()}
    if not texts["limit"]:
        try:
            ended = json.loads(texts["status"])
        except ValueError:  # no keeper ends so: it could not start, or it was killed
            said = texts["errors"].decode(errors="replace").strip().splitlines()
            why = said[-1] if said else "no reason given"
            raise OSError(f"its keeper ended early: {why}") from None
        if "error" in ended:
            raise OSError(ended["error"])
    return Ran(
        ended.get("code"),
        ended.get("signal"),
        ended.get("limit"),
        texts["output"].decode(errors="replace"),
        texts["errors"].decode(errors="replace"),
        texts["told"],
        seconds,
    )
