"""The process beside a program: starts it, holds it to its limits, ends all that it started.

In a box this is process 1, so that nothing outlives it and no signal from inside reaches it. It
tells how the program ended, as a line of JSON on a pipe; when the other end of that pipe closes
(its reader has seen enough, or is dead), it ends everything.
"""

import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from dsv3_jax.posttrain.sandbox.limits import Limits, hold

if sys.platform == "linux":  # at once: in a box there may be no file to import from
    from dsv3_jax.posttrain.sandbox import linux, namespaces, system_calls

_TICK = 0.01  # seconds between two looks at the program
_COUNT = 5  # ticks between two looks at its memory


def main(how: str, settings: Mapping[str, Any]) -> None:
    """`how`: namespaces (the box is made here), inside (it has been made around us), none."""
    status = settings["status"]
    os.set_inheritable(status, False)
    try:
        limits = Limits(**settings["limits"])
        if how == "namespaces":
            namespaces.enter(limits, settings["shown"])
        ended = _keep(limits, settings, boxed=how != "none")
    except OSError as error:
        ended = {"error": " ".join((error.strerror or str(error)).split())}
    with contextlib.suppress(OSError):  # nobody reads any more
        os.write(status, json.dumps(ended).encode() + b"\n")
    os._exit(0)


def _keep(limits: Limits, settings: Mapping[str, Any], boxed: bool) -> dict[str, Any]:
    _settle(boxed)
    folder = settings["folder"]
    os.chdir(folder)
    with open(settings["files"], encoding="utf-8") as file:
        for name, text in json.load(file).items():
            with open(name, "w", encoding="utf-8", errors="replace") as written:
                written.write(text)
    program = os.fork()
    if not program:
        _become(limits, settings, boxed)
    ended = _watch(program, limits, settings["status"])
    _end_all()
    return ended


def _settle(boxed: bool) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        linux.prctl(linux.PR_SET_DUMPABLE, 0)
        if not boxed:  # whoever loses its parent becomes our child; process 1 has that by nature
            linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)


def _become(limits: Limits, settings: Mapping[str, Any], boxed: bool) -> None:
    """The program. Never returns."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        if sys.platform == "linux":
            linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
            if boxed:
                system_calls.install()
        # The system counts all threads of a user: in a box, these and the two that keep it.
        hold(limits, limits.processes + (2 if boxed else _threads_of_user()))
        os.execve(settings["argv"][0], settings["argv"], settings["environment"])
    except BaseException as error:
        os.write(2, f"could not start: {error}\n".encode())
    os._exit(127)


def _watch(program: int, limits: Limits, status: int) -> dict[str, Any]:
    end, tick = time.monotonic() + limits.seconds, 0
    reader = select.poll()
    reader.register(status, 0)  # POLLERR once its other end is closed
    while True:
        done = _reaped(program)
        if done is not None:
            return {"signal": -done} if done < 0 else {"code": done}
        if time.monotonic() > end:
            return {"limit": "seconds"}
        tick += 1
        if tick % _COUNT == 0 and _resident() > limits.memory_bytes:
            return {"limit": "memory_bytes"}
        if reader.poll(_TICK * 1000):
            return {"limit": "reader"}


def _reaped(program: int) -> int | None:
    """The program's exit code, or −signal, once it has ended; all others that ended are gone."""
    while True:
        try:
            pid, code = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return None
        if not pid:
            return None
        if pid == program:
            return os.waitstatus_to_exitcode(code)


def _end_all() -> None:
    """Every process under this one: again and again, since one may fork while it is looked for."""
    while True:
        for pid in [-1] if os.getpid() == 1 else _below():  # −1: all of a box but process 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _below() -> list[int]:
    """Processes under this one, as far as /proc shows them."""
    parents = dict(_parents())
    found, queue = [], [os.getpid()]
    while queue:
        above = queue.pop()
        children = [pid for pid, parent in parents.items() if parent == above]
        found += children
        queue += children
    return found


def _parents() -> Iterator[tuple[int, int]]:
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    yield int(name), int(file.read().rpartition(b")")[2].split()[1])
            except OSError:
                continue


def _threads_of_user() -> int:
    """That run already, as far as /proc shows them."""
    count = 0
    for pid, _ in _parents():
        try:
            if os.stat(f"/proc/{pid}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{pid}/task"))
        except OSError:
            continue
    return count


def _resident() -> int:
    """Bytes of all processes under this one; shared pages count for each that has them."""
    pages = 0
    for pid in _below():
        try:
            with open(f"/proc/{pid}/statm", "rb") as file:
                pages += int(file.read().split()[1])
        except OSError:
            continue
    return pages * os.sysconf("SC_PAGE_SIZE")
