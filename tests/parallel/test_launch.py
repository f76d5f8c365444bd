"""Several processes on one machine: the right exit code, one message, nobody left behind.

The processes are a few lines of Python here, without JAX; whole runs are in
`tests/train/test_process_runs.py`.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3_jax.parallel.launch import LaunchOptions, check, run

ROOT = Path(__file__).parents[2]
CHILD = """
import os, signal, sys, time
from dsv3_jax.parallel import launch
from dsv3_jax.parallel.launch import LaunchOptions
here = launch.started()
if not here:
    sys.exit(launch.run(LaunchOptions(processes=3)))
index = here.place[0]
if index == 0:
    from pathlib import Path
    here.tell_run(Path("runs/x-001"))
else:
    time.sleep(0.5)
print(f"process {index} is {os.getpid()}", flush=True)
"""


GO_ON = "the others were stopped; go on with --resume runs/x-001"


def job(code: str) -> subprocess.Popen:
    """Three processes that each run `code`."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD + code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def children(of: int) -> list[int]:
    tasks = Path(f"/proc/{of}/task/{of}/children").read_text().split()
    return [int(pid) for pid in tasks]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: list[int]) -> bool:
    """Within five seconds."""
    end = time.monotonic() + 5
    while any(map(is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(is_alive, pids))


def test_only_the_first_process_is_heard():
    out, error = (started := job("")).communicate(timeout=60)
    assert (started.returncode, error) == (0, "")
    (line,) = out.splitlines()
    assert line.startswith("process 0 is ")


@pytest.mark.parametrize(
    ("code", "returned", "last", "lines"),
    [
        (
            "if index == 2: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)",
            137,
            f"error: process 2 of 3 was ended by SIGKILL; {GO_ON}",
            1,
        ),
        (
            "if index == 1: raise RuntimeError('lost')\ntime.sleep(60)",
            1,
            f"error: process 1 of 3 ended with exit code 1; {GO_ON}",
            4,
        ),
        ("sys.exit(3)", 3, "", 0),
        ("if index == 2: print('error: no disk', file=sys.stderr)\nsys.exit(2)", 2, "", 0),
    ],
)
def test_who_ends_the_others_is_named(code: str, returned: int, last: str, lines: int):
    _, error = (started := job(code)).communicate(timeout=60)
    assert started.returncode == returned
    assert len(error.splitlines()) == lines
    assert error.splitlines()[-1:] == ([last] if last else [])


def test_a_signal_goes_to_all_and_its_number_comes_back():
    code = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\nprint('here', flush=True)\n"
    started = job(code + "time.sleep(60)")
    while started.stdout.readline() != "here\n":
        pass
    time.sleep(0.5)  # the others are as far
    pids = children(started.pid)
    started.send_signal(signal.SIGTERM)
    assert started.wait(timeout=30) == 143
    assert started.communicate()[1] == ""
    assert len(pids) == 3
    assert gone(pids)


def test_a_death_while_a_signal_is_obeyed_ends_all():
    code = """
def obey(number, frame):
    if index == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
signal.signal(signal.SIGTERM, obey)
time.sleep(60)
"""
    started = job(code)
    started.stdout.readline()
    time.sleep(1.0)  # the others are as far
    started.send_signal(signal.SIGTERM)
    _, error = started.communicate(timeout=30)
    assert started.returncode == 137
    assert error == f"error: process 2 of 3 was ended by SIGKILL; {GO_ON}\n"


def test_nobody_outlives_the_launcher():
    started = job("time.sleep(60)")
    started.stdout.readline()
    time.sleep(0.5)
    pids = children(started.pid)
    started.kill()
    started.communicate()
    assert len(pids) == 3
    assert gone(pids)


@pytest.mark.parametrize(
    ("options", "devices", "mesh", "said"),
    [
        (LaunchOptions(0), None, 1, "launch.processes is 0; allowed: 1 to 256"),
        (LaunchOptions(2), 8, 4, "--devices is 8, and the axes of mesh multiply to 4; allowed"),
        (LaunchOptions(3), None, 8, "launch.processes is 3, which does not divide the 8 devices"),
        (LaunchOptions(2, port=-1), None, 2, "launch.port is -1; allowed: 0 to 65,535"),
        (LaunchOptions(2, cluster=True), None, 2, "launch.cluster and launch.processes"),
        (LaunchOptions(hang_seconds=-1.0), None, 1, "launch.hang_seconds is -1.0; allowed"),
        (LaunchOptions(2), None, 2**20, "launch.processes is 2, and the axes of mesh multiply to"),
    ],
)
def test_what_cannot_be_is_refused(options: LaunchOptions, devices, mesh: int, said: str):
    with pytest.raises(ValueError, match="^" + said):
        check(options, devices, mesh)


def test_a_port_that_is_taken_is_refused():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(ValueError, match=f"launch.port is {port}: Address already in use"):
            run(LaunchOptions(2, port=port))
        assert len(os.listdir("/proc/self/fd")) == before
