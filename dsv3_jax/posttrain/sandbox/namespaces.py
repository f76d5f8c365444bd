"""A box out of Linux namespaces: its own users, files, processes, network, IPC, host name.

Its files are a new tree in memory: the system's programs and Python's folder, read-only, a few
devices, and one folder of limited size that can be written. All else of the host is not there. It
needs Linux 5.12 and, for users other than root, that they may make namespaces.
"""

import os
import stat

from dsv3_jax.posttrain.sandbox import linux
from dsv3_jax.posttrain.sandbox.limits import Limits

FOLDER = "/box"
USER = 1
"""In the box; outside it is who started it or, for root, nobody"""
NOBODY = 65534
DEVICES = ("null", "zero", "full", "random", "urandom")
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache")
_NODES = 4096
_STAGE, _NEW, _OLD = "/tmp", "/new", "/old"


def seen(python: str) -> list[str]:
    """Files and folders of the host that a box shows: the system's, and Python's own. A link
    stays one.
    """
    prefix = os.path.realpath(python)
    below = any(prefix == place or prefix.startswith(f"{place}/") for place in SYSTEM[:2])
    return [*filter(os.path.lexists, SYSTEM), *([] if below else [prefix])]


def enter(limits: Limits, shown: list[str]) -> None:
    """Returns in the box's first process; the one that called waits for it and ends as it did.
    OSError where a step is not allowed.
    """
    own, other = os.pipe()
    keeper = os.fork()  # maps users from outside, where root still has the right to
    if not keeper:
        os._exit(_map_users(os.getppid(), own))
    linux.unshare(
        linux.CLONE_NEWUSER
        | linux.CLONE_NEWNS
        | linux.CLONE_NEWPID
        | linux.CLONE_NEWNET
        | linux.CLONE_NEWIPC
        | linux.CLONE_NEWUTS
        | linux.CLONE_NEWCGROUP
    )
    os.write(other, b".")
    os.close(own)
    os.close(other)
    if code := os.waitpid(keeper, 0)[1]:
        number = os.waitstatus_to_exitcode(code)
        raise OSError(number, f"uid_map: {os.strerror(number)}")
    first = os.fork()
    if first:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) & 0xFF)
    _make_files(limits, shown)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
    linux.drop_capabilities()


def _map_users(process: int, told: int) -> int:
    """An errno. Root's box maps root too, while it is made: it may then read what root may."""
    os.read(told, 1)
    mine, group = os.geteuid(), os.getegid()
    users, groups = f"{USER} {mine} 1\n", f"{USER} {group} 1\n"
    if mine == 0:
        users = groups = f"0 0 1\n{USER} {NOBODY} 1\n"
    try:
        if mine:
            _write(f"/proc/{process}/setgroups", "deny")
        _write(f"/proc/{process}/gid_map", groups)
        _write(f"/proc/{process}/uid_map", users)
    except OSError as error:
        return error.errno or 1
    return 0


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _make_files(limits: Limits, shown: list[str]) -> None:
    """In the box's first process. The host's tree is moved aside, a new one built, the host's
    dropped.
    """
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
    plain = linux.MS_NOSUID | linux.MS_NODEV
    linux.mount("tmpfs", _STAGE, "tmpfs", plain, "mode=755,size=1m")
    for place in (_NEW, _OLD):
        os.mkdir(_STAGE + place)
    linux.change_root(_STAGE, _STAGE + _OLD)
    os.chdir("/")
    linux.mount("tmpfs", _NEW, "tmpfs", plain, "mode=755,size=1m")
    for path in shown:
        _show(path)
    os.mkdir(f"{_NEW}/dev")
    for name in DEVICES:
        _show(f"/dev/{name}", devices=True)
    os.mkdir(f"{_NEW}/proc")
    linux.mount("proc", f"{_NEW}/proc", "proc", plain | linux.MS_NOEXEC)
    linux.make_read_only(f"{_NEW}/proc")
    os.mkdir(_NEW + FOLDER)
    size = f"mode=755,size={limits.folder_bytes},nr_inodes={_NODES}"
    linux.mount("tmpfs", _NEW + FOLDER, "tmpfs", plain, size)
    os.chown(_NEW + FOLDER, USER, USER)
    os.chdir(_NEW)
    linux.change_root(".", ".")  # the old root lies over the new one, the host's within it
    linux.detach(".")
    os.chdir("/")
    _lock_root()


def _show(path: str, devices: bool = False) -> None:
    old, new = _OLD + path, _NEW + path
    os.makedirs(os.path.dirname(new), exist_ok=True)
    kind = os.lstat(old).st_mode
    if stat.S_ISLNK(kind):
        os.symlink(os.readlink(old), new)
        return
    if stat.S_ISDIR(kind):
        os.mkdir(new)
    else:
        os.close(os.open(new, os.O_CREAT | os.O_WRONLY))
    linux.mount(old, new, None, linux.MS_BIND | linux.MS_REC)
    linux.make_read_only(new, devices)


def _lock_root() -> None:
    """The root itself, not what is mounted in it."""
    remount = 32 | 1  # MS_REMOUNT, MS_RDONLY
    linux.mount("none", "/", None, remount | linux.MS_BIND | linux.MS_NOSUID | linux.MS_NODEV)
