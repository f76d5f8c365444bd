"""The allocator's settings and the folder of compiled programs, before JAX is imported."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax import process

ROOT = Path(__file__).parents[1]
SHOW = """
import os
from dsv3_jax import process
process.prepare()
print(*(os.environ.get(name, "-") for name in (*process.SETTINGS, process.SWITCH)))
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")


def shown(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """What a process that prepares itself says of its settings."""
    kept = {k: v for k, v in os.environ.items() if k not in (*process.SETTINGS, process.SWITCH)}
    return subprocess.run(
        [sys.executable, "-c", SHOW, *arguments],
        cwd=ROOT,
        env={**kept, "JAX_PLATFORMS": "cpu", **changes},
        capture_output=True,
        text=True,
    )


@glibc
def test_a_command_starts_itself_once_more_with_the_settings():
    expected = " ".join([*process.SETTINGS.values(), "-"])
    assert shown().stdout.strip() == expected


@glibc
@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        ((), {process.SWITCH: "default"}),
        ((), {"MALLOC_ARENA_MAX": "7"}),
        ((), {"JAX_PLATFORMS": "cuda"}),
        (("--help",), {}),
    ],
    ids=["switched off", "settings of the user's own", "an accelerator", "only help"],
)
def test_otherwise_the_allocator_stays_as_it_is(arguments, changes):
    names = (*process.SETTINGS, process.SWITCH)
    assert shown(*arguments, **changes).stdout.split() == [changes.get(n, "-") for n in names]


def test_an_unknown_value_of_the_switch_is_one_line():
    ended = shown(**{process.SWITCH: "fast"})
    assert ended.returncode == 2
    assert ended.stderr == "error: DSV3_ALLOCATOR is 'fast'; allowed: 'default', or none\n"


def test_compiled_programs_are_kept_in_the_cache_unless_the_user_says_where(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    folder = process.compilation_cache({})["JAX_COMPILATION_CACHE_DIR"]
    assert folder == "/x/dsv3_jax/xla"
    own = {"JAX_COMPILATION_CACHE_DIR": ""}
    assert process.compilation_cache(own)["JAX_COMPILATION_CACHE_DIR"] == ""
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert process.compilation_cache({}) == {}


COUNT = "--xla_force_host_platform_device_count="


@pytest.mark.parametrize(
    ("environment", "devices", "told"),
    [
        ({}, "3", "3 cpu"),
        ({"XLA_FLAGS": f"{COUNT}4"}, "4", "4 cpu"),
        ({"XLA_FLAGS": f"{COUNT}4"}, "None", "4 cpu"),
        ({"JAX_NUM_CPU_DEVICES": "2"}, "2", "2 cpu"),
        (
            {"XLA_FLAGS": f"{COUNT}4"},
            "2",
            "--devices is 2, and XLA_FLAGS asks for 4 CPU devices; allowed: one of them",
        ),
        (
            {"JAX_NUM_CPU_DEVICES": "2"},
            "4",
            "--devices is 4, and JAX_NUM_CPU_DEVICES asks for 2 CPU devices; allowed: one of them",
        ),
        ({"XLA_FLAGS": f"{COUNT}x"}, "None", "XLA_FLAGS asks for 'x' CPU devices; allowed: 1 to"),
        ({"XLA_FLAGS": f"{COUNT}0"}, "None", "XLA_FLAGS asks for '0' CPU devices; allowed: 1 to"),
        ({}, "5000", "--devices is 5000; allowed: 1 to 4,096"),
        ({"JAX_PLATFORMS": "cuda"}, "None", "JAX finds no device (JAX_PLATFORMS is 'cuda'): "),
    ],
)
def test_devices_are_emulated_or_refused_in_a_line(environment: dict, devices: str, told: str):
    program = f"""
from dsv3_jax import process
try:
    process.emulate({devices})
    process.check_devices()
except ValueError as error:
    print(error)
else:
    import jax
    print(jax.device_count(), jax.default_backend())
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **environment}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(told)
    assert len(done.stdout.splitlines()) == 1
