"""Running generated code: limits that hold, and refusals without a box."""

import os
import signal
import sys
import tempfile

import pytest

from dsv3_jax.posttrain import code_runner, containment
from dsv3_jax.posttrain.code_runner import NoBox, Program, Runner, find_box
from dsv3_jax.posttrain.containment import Box
from dsv3_jax.posttrain.sandbox.limits import Limits
from tests.posttrain.programs import SMALL, processes_with, run


@pytest.fixture(scope="module", params=["box", "none"])
def place(request: pytest.FixtureRequest) -> Box | None:
    """The box that is taken here, and none."""
    if request.param == "none":
        return None
    found, reasons = find_box()
    if found is None:
        pytest.skip(f"no box: {reasons}")
    return found


def test_a_program_has_its_folder_its_input_and_nothing_of_our_environment(
    place: Box | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SECRET_OF_OURS", "here")
    source = (
        "import os, sys\n"
        "print(sys.stdin.read(), open('other.txt').read(), sorted(os.environ), os.listdir())\n"
        "print(len(os.listdir('/proc/self/fd')) if sys.platform == 'linux' else 4)\n"
        "print('said', file=sys.stderr)\n"
    )
    program = Program(("main.py",), {"main.py": source, "other.txt": "é\udc80"}, stdin="in")
    ran = Runner(place, SMALL).run(program)
    names = "['HOME', 'LANG', 'PATH', 'TMPDIR']"
    folder = "['main.py', 'other.txt']"
    assert ran.errors == "said\n"
    assert (ran.code, ran.trouble) == (0, "")
    first, descriptors = ran.output.splitlines()
    assert first in (f"in é? {names} {folder}", f"in é? {names} ['other.txt', 'main.py']")
    assert int(descriptors) == 4  # the three, and the one that lists them


@pytest.mark.parametrize(
    ("source", "trouble"),
    [
        ("x = 1\ny = x / 0\n", "main.py line 2: ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit(3)", "exit code 3"),
        ("if", "main.py line 1: SyntaxError: invalid syntax"),
        ("import os\nos.abort()", "was ended by SIGABRT"),
        ("def f(n): return f(n + 1)\nf(0)", "RecursionError"),
        ("import ctypes\nctypes.string_at(0)", "was ended by SIGSEGV"),
        ("bytearray(1 << 30)", "MemoryError"),
        ("open('f', 'wb').write(bytes(20 << 20))", "OSError"),
        ("files = [open('main.py') for _ in range(100)]", "OSError: [Errno 24]"),
    ],
)
def test_how_a_program_ends_is_told_in_a_line(source: str, trouble: str):
    said = run(find_box()[0], source).trouble
    assert "\n" not in said
    assert trouble in said


def test_recursion_without_a_limit_ends_by_memory_or_by_the_stack():
    source = "import sys\nsys.setrecursionlimit(2**31 - 1)\ndef f(n): return f(n + 1)\nf(0)"
    limits = Limits(seconds=120.0, cpu_seconds=60, memory_bytes=80 << 20)
    ran = run(find_box()[0], source, limits)
    assert (ran.limit, ran.code != 0) == (None, True)  # Python's own word for it differs
    assert ran.trouble


def test_a_loop_ends_by_its_cpu_time():
    ran = run(find_box()[0], "while True: pass", Limits(seconds=120.0, cpu_seconds=1))
    assert (ran.signal, ran.trouble) == (signal.SIGXCPU, "used up its CPU time")


def test_a_program_that_ignores_all_signals_ends_by_the_clock(place: Box | None):
    stubborn = (
        "import signal, time\n"
        "for number in range(1, 32):\n"
        "    if number not in (9, 19): signal.signal(number, signal.SIG_IGN)\n"
        "while True: time.sleep(1)\n"
    )
    sleep = run(place, stubborn, Limits(seconds=0.5))
    assert (sleep.limit, sleep.trouble) == ("seconds", "took longer than it may")
    assert sleep.seconds < 10


def test_a_program_that_prints_without_end_is_stopped_at_its_share(place: Box | None):
    for stream in ("stdout", "stderr"):
        ran = run(place, f"import sys\nwhile True: print('x' * 99, file=sys.{stream})")
        assert (ran.limit, ran.trouble) == ("output_bytes", "printed more than it may")
        assert len(ran.output) + len(ran.errors) == SMALL.output_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="/proc finds the processes")
def test_a_daemon_that_is_left_behind_is_ended(place: Box | None):
    mark = f"mark_{os.getpid()}_{place}"
    source = (
        "import os, subprocess, sys, time\n"
        "if not os.fork():\n"
        "    os.setsid()\n"
        "    if not os.fork():\n"
        f"        os.execv(sys.executable, [sys.executable, '-c', "
        f"'import time; open(\"up\", \"w\"); time.sleep(600)', '{mark}'])\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "while not os.path.exists('up'): time.sleep(0.01)\n"
    )
    ran = run(place, source)
    assert (ran.code, ran.trouble) == (0, "")
    assert processes_with(mark) == []


def test_programs_that_share_memory_out_among_them_are_ended(place: Box | None):
    source = (
        "import os, time\n"
        "for _ in range(4):\n"
        "    if not os.fork():\n"
        "        kept = bytearray(100 << 20)\n"
        "        time.sleep(60)\n"
        "time.sleep(60)\n"
    )
    ran = run(place, source)
    assert (ran.limit, ran.trouble) == ("memory_bytes", "used more memory than it may")


def test_without_a_box_processes_are_limited_for_users_but_root():
    if os.geteuid() == 0:
        pytest.skip("no limit counts root's processes")
    source = (
        "import os, time\n"
        "count = 1\n"
        "try:\n"
        "    while count < 1000:\n"
        "        if not os.fork(): time.sleep(60)\n"
        "        count += 1\n"
        "except BlockingIOError:\n"
        "    print(count, flush=True)\n"
    )
    assert 1 <= int(run(None, source).output) < 1000


def test_what_a_program_reads_and_tells_beside_its_output(place: Box | None):
    source = (
        "import os, sys\n"
        "text = open(int(sys.argv[1])).read()\n"
        "os.write(int(sys.argv[2]), text[::-1].encode())\n"
    )
    assert run(place, source, handed="abc").told == b"cba"
    flood = "import os, sys\nwhile True: os.write(int(sys.argv[2]), bytes(9999))"
    assert run(place, flood, handed="").limit == "output_bytes"


# --- refusals ------------------------------------------------------------------------------------


def test_without_a_box_code_is_refused_by_one_line(monkeypatch: pytest.MonkeyPatch):
    reasons = {"namespaces": "unshare: Operation not permitted", "bubblewrap": "is not installed"}
    monkeypatch.setattr(code_runner, "find_box", lambda: (None, reasons))
    with pytest.raises(NoBox) as refused:
        Runner.open()
    assert str(refused.value) == (
        "running generated code is refused: no box works here (namespaces: unshare: Operation not "
        "permitted; bubblewrap: is not installed); allowed: a system with bubblewrap or user "
        "namespaces, or --unsafe-local-exec"
    )
    assert Runner.open(unsafe_local_exec=True) == Runner(None, Limits())


def test_a_box_that_does_not_contain_is_not_taken(monkeypatch: pytest.MonkeyPatch):
    real = containment.command
    monkeypatch.setattr(
        containment, "command", lambda box, limits, settings: real(None, limits, settings)
    )
    monkeypatch.setattr(containment, "FOLDER", tempfile.gettempdir())
    why = code_runner._trial("namespaces")
    assert why is not None


@pytest.mark.parametrize(
    "wrong",
    [{"seconds": 0.0}, {"cpu_seconds": -1}, {"memory_bytes": 1.5}, {"processes": 2**40}],
)
def test_limits_that_cannot_be_are_refused(wrong: dict):
    name = next(iter(wrong))
    with pytest.raises(ValueError, match=rf"limits\.{name} is .*; allowed: above 0"):
        Runner.open(Limits(**wrong))
