"""How a program that a model wrote is kept from everything else: the command that starts its box.

Two kinds of box, of the same contents and with the same filter of system calls: `namespaces`, made
by this package, and `bubblewrap`, which some systems allow where they forbid their users
namespaces. Without a box there are limits alone.
"""

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from dsv3_jax.posttrain.sandbox import system_calls
from dsv3_jax.posttrain.sandbox.limits import Limits

Box = Literal["namespaces", "bubblewrap"]
BOXES: tuple[Box, ...] = ("namespaces", "bubblewrap")
FOLDER = "/box"
"""Where a boxed program stands"""
_USER = "1"
_ROOT = Path(__file__).parents[2]
_OURS = ("__init__.py", "posttrain/__init__.py", "posttrain/sandbox")
_START = (
    "import json, sys; sys.path.insert(0, sys.argv[1]); "
    "from dsv3_jax.posttrain.sandbox.keeper import main; main(sys.argv[2], json.loads(sys.argv[3]))"
)


def python() -> str:
    """The interpreter that runs programs: the one below any virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def unavailable(box: Box) -> str | None:
    """Why this system cannot have it, as far as can be told without a trial."""
    if sys.platform != "linux":
        return f"{sys.platform} has none"
    machine = os.uname().machine
    if not system_calls.knows(machine):
        return f"no filter of system calls for {machine}"
    if box == "bubblewrap" and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    if box == "bubblewrap" and os.geteuid() == 0:
        return "its programs are root's, whose processes no limit counts"
    return None


def shown() -> list[str]:
    """Files and folders of the host that a box shows."""
    from dsv3_jax.posttrain.sandbox.namespaces import seen

    return seen(sys.base_prefix)


def command(box: Box | None, limits: Limits, settings: str) -> list[str]:
    """What starts the keeper of a program; `settings` as JSON."""
    keeper = [python(), "-I", "-S", "-c", _START, str(_ROOT)]
    if box == "bubblewrap":
        return [*_bubblewrap(limits), *keeper, "inside", settings]
    return [*keeper, box or "none", settings]


def environment(folder: str) -> Mapping[str, str]:
    """All variables that a program has."""
    return {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"}


def _bubblewrap(limits: Limits) -> list[str]:
    from dsv3_jax.posttrain.sandbox.namespaces import DEVICES

    options: list[Any] = [
        "--unshare-all",
        "--unshare-user",
        "--die-with-parent",
        "--as-pid-1",
        "--cap-drop",
        "ALL",
    ]
    options += ["--uid", _USER, "--gid", _USER]
    for path in shown():
        if os.path.islink(path):
            options += ["--symlink", os.readlink(path), path]
        else:
            options += ["--ro-bind", path, path]
    for name in DEVICES:
        options += ["--dev-bind", f"/dev/{name}", f"/dev/{name}", "--remount-ro", f"/dev/{name}"]
    for name in _OURS:
        options += ["--ro-bind", _ROOT / "dsv3_jax" / name, _ROOT / "dsv3_jax" / name]
    options += [
        "--proc",
        "/proc",
        "--remount-ro",
        "/proc",
        "--size",
        limits.folder_bytes,
        "--tmpfs",
        FOLDER,
    ]
    options += ["--remount-ro", "/", "--chdir", FOLDER]
    return [shutil.which("bwrap") or "bwrap", *map(str, options)]
