"""Boxes of generated code: what a program in one can neither read, write, reach nor leave."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3_jax.posttrain import code_runner, containment
from dsv3_jax.posttrain.containment import BOXES, Box
from dsv3_jax.posttrain.sandbox.limits import Limits
from tests.posttrain.programs import SMALL, processes_with, run

OF_THE_SYSTEM = re.compile(
    r"(unshare|uid_map|mount|mount_setattr|pivot_root): |bwrap is not installed"
    r"|its keeper ended early: bwrap: |no filter of system calls for |\w+ has none"
)


def why_not(box: Box) -> str | None:
    """Of a box; root may try bubblewrap here, though the package does not take it."""
    if box == "bubblewrap" and sys.platform == "linux" and shutil.which("bwrap"):
        return code_runner._trial(box)
    return containment.unavailable(box) or code_runner._trial(box)


@pytest.fixture(scope="module", params=BOXES)
def box(request: pytest.FixtureRequest) -> Box:
    """Each that this system has. A box that is made but does not contain is no reason to skip."""
    if why := why_not(request.param):
        assert OF_THE_SYSTEM.match(why), why
        pytest.skip(f"{request.param}: {why}")
    return request.param


def test_forks_without_end_are_few_and_all_ended(box: Box):
    if box == "bubblewrap" and os.geteuid() == 0:
        pytest.skip("no limit counts root's processes: the package does not take this one for root")
    source = (
        "import os, time\n"
        "count = 1\n"
        "try:\n"
        "    while count < 100:\n"
        "        if not os.fork(): time.sleep(60)\n"
        "        count += 1\n"
        "except BlockingIOError:\n"
        "    print(count, flush=True)\n"
    )
    ran = run(box, source)
    assert ran.code == 0
    assert SMALL.processes <= int(ran.output) <= SMALL.processes + 1
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"
    assert run(box, bomb, Limits(seconds=0.5)).trouble == "took longer than it may"


NS = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")


def test_nothing_of_the_host_can_be_written_or_read(box: Box, tmp_path: Path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    tmp_path.chmod(0o777)
    secret.chmod(0o666)
    ours = [
        (one.name, os.readlink(one)) for one in Path("/proc/self/ns").iterdir() if one.name in NS
    ]
    places = [str(secret), str(tmp_path / "new"), "/new", "/usr/new", "/dev/new", "/proc/1/mem"]
    source = (
        f"for place in {[*places, '/tmp/new', '/etc/passwd', '/box/../new']}:\n"
        "    for mode in 'ra':\n"
        "        try: open(place, mode)\n"
        "        except OSError: continue\n"
        "        print(place, mode)\n"
        "import os\n"
        f"print([n for n, it in {ours} if os.readlink('/proc/self/ns/' + n) == it])\n"
        "mounts = [line.split() for line in open('/proc/self/mountinfo')]\n"
        "print([m[4] for m in mounts if 'ro' not in m[5].split(',')])\n"
        "print([m[4] for m in mounts if 'nosuid' not in m[5].split(',')])\n"
        "for write in (lambda: os.write(0, b'x'), lambda: open('/proc/self/comm', 'w')):\n"
        "    try: write()\n"
        "    except OSError as error: print(error.errno)\n"
        "print(sorted(set(os.listdir('/')) & {'home', 'var', 'sys', 'run', 'mnt'}))\n"
        "for place in (os.__file__, '/dev/null', '/bin/sh', '/box'):\n"
        "    for change in (os.unlink, os.rmdir, lambda path: os.chmod(path, 0o666),\n"
        "                   lambda path: os.rename(path, path + '_')):\n"
        "        try: change(place)\n"
        "        except OSError: continue\n"
        "        print(place)\n"
    )
    ran = run(box, source)
    assert (ran.output, ran.errors) == ("[]\n['/box']\n[]\n9\n30\n[]\n/box\n", "")
    assert secret.read_text() == "secret"
    assert os.listdir(tmp_path) == ["secret.txt"]


def test_its_folder_holds_so_much_and_may_be_deleted(box: Box):
    fill = (
        "import os\n"
        "size = 0\n"
        "try:\n"
        "    for n in range(100):\n"
        "        with open(str(n), 'wb', buffering=0) as file:\n"
        "            size += file.write(bytes(1 << 20))\n"
        "except OSError as error:\n"
        "    print(size, error.errno)\n"
    )
    room = 4 << 20
    assert run(box, fill, Limits(folder_bytes=room)).output in (
        f"{room - (1 << 20)} 28\n",  # the program's own file has a page of the last MiB
        f"{room - 4096} 28\n",
        f"{room} 28\n",
    )
    delete = (
        "import os, shutil\nshutil.rmtree(os.getcwd(), ignore_errors=True)\nprint(os.listdir())"
    )
    assert run(box, delete).output == "[]\n"


def test_no_socket_reaches_the_host(box: Box):
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()):
            pass  # one from here does
        source = (
            "import socket\n"
            "families = ('AF_INET', 'AF_INET6', 'AF_NETLINK', 'AF_PACKET', 'AF_VSOCK', 'AF_ALG')\n"
            "for name in families:\n"
            "    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):\n"
            "        try: socket.socket(getattr(socket, name), kind)\n"
            "        except PermissionError: continue\n"
            "        print(name)\n"
            "one, other = socket.socketpair()\n"
            "print(one.send(b'x'))\n"
            f"try: socket.create_connection({server.getsockname()!r})\n"
            "except OSError as error: print(error.errno)\n"
        )
        assert run(box, source).output == "1\n1\n"


def test_no_other_process_is_seen_or_reached(box: Box):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        source = (
            "import os, signal\n"
            "numbers = sorted(int(name) for name in os.listdir('/proc') if name.isdecimal())\n"
            f"print(len(numbers), os.getpid() in numbers, os.getppid())\n"
            f"for number in ({other.pid}, {os.getpid()}):\n"
            "    try: os.kill(number, 0)\n"
            "    except ProcessLookupError: print('none')\n"
            "for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):\n"
            "    os.kill(1, number)\n"
            "print(os.getppid())\n"
        )
        assert run(box, source).output == "2 True 1\nnone\nnone\n1\n"
        assert other.poll() is None
        other.communicate(b"\n")


REFUSED = (
    "c.unshare(0x10000000)",  # users
    "c.unshare(0x20000)",  # mounts
    "c.mount(b'none', b'/box', b'tmpfs', 0, None)",
    "c.umount2(b'/proc', 2)",
    "c.chroot(b'/usr')",
    "c.sethostname(b'x', 1)",
    "c.memfd_create(b'x', 0)",
    "c.shmget(0, 4096, 0o1600)",
    "c.ptrace(0, 0, 0, 0)",
    "c.syscall(425, 1, None)",  # io_uring_setup
    "c.clone(ctypes.cast(c.getpid, ctypes.c_void_p), stack, 0x10000011, None)",
)


def test_calls_that_lead_out_of_a_box_are_refused_and_it_has_no_privileges(box: Box):
    source = (
        "import ctypes, os\n"
        "c = ctypes.CDLL(None, use_errno=True)\n"
        "c.mount.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_void_p]\n"
        "memory = ctypes.create_string_buffer(65536)\n"
        "stack = ctypes.c_void_p(ctypes.addressof(memory) + 32768)\n"
        f"for attempt in {REFUSED}:\n"
        "    ctypes.set_errno(0)\n"
        "    if (eval(attempt), ctypes.get_errno()) != (-1, 1): print(attempt)\n"
        "status = open('/proc/self/status').read()\n"
        "print([line.split()[1] for line in status.splitlines()\n"
        "       if line.startswith(('CapPrm', 'CapEff', 'NoNewPrivs', 'Seccomp:'))])\n"
        "print(os.getresuid(), os.getresgid())\n"
        "keeper = open('/proc/1/status').read()\n"
        "print([line.split()[1] for line in keeper.splitlines()\n"
        "       if line.startswith(('CapPrm', 'CapEff', 'Uid'))])\n"
    )
    ran = run(box, source)
    none = "0" * 16
    assert ran.output == (
        f"['{none}', '{none}', '1', '2']\n(1, 1, 1) (1, 1, 1)\n['1', '{none}', '{none}']\n"
    )
    assert ran.trouble == ""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc finds the processes")
def test_a_box_ends_with_the_process_that_runs_it(box: Box):
    mark = f"mark_{os.getpid()}_{box}"
    source = (
        "import os, sys\n"
        "os.execv(sys.executable, [sys.executable, '-c', "
        f"'import time; time.sleep(600)', '{mark}'])"
    )
    ours = (
        "from dsv3_jax.posttrain.code_runner import Program, Runner\n"
        "from dsv3_jax.posttrain.sandbox.limits import Limits\n"
        f"Runner({box!r}, Limits(seconds=3600.0)).run(Program(('-c', {source!r})))"
    )
    with subprocess.Popen([sys.executable, "-c", ours], cwd=Path(__file__).parents[2]) as process:
        wait_for(lambda: len(processes_with(f"\0{mark}")) >= 1)
        process.kill()
        process.wait()
    wait_for(lambda: not processes_with(f"\0{mark}"))


def wait_for(holds) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)
