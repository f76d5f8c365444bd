"""The command: what it says, how it ends, and one line for what cannot work."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dsv3_jax.serve import main
from tests.checkpoint.run_folders import write_run
from tests.commands import help_of, mistake_of
from tests.server.clients import ask, events, open_socket, raw_request, streaming

ROOT = Path(__file__).parents[1]
ENDLESS = b'{"prompt": "some", "max_tokens": 50, "stream": true}'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "small", 5)


def test_help_names_every_path_and_loads_no_jax():
    said, loaded = help_of("dsv3_jax.serve")
    for name in ("/v1/chat/completions", "/metrics", "--keys-file", "DSV3_API_KEYS", "--queue"):
        assert name in said
    assert not {"jax", "starlette", "pydantic", "uvicorn"} & loaded


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--port", "70000"], "--port is 70000; allowed: 0 to 65535"),
        (["--host", "203.0.113.7"], "allowed: an address of this machine, and a port that is free"),
        (["--host", "no such host"], "allowed: an address of this machine"),
        (["--max-prompt", "0"], "--max-prompt is 0; allowed: 1 or more"),
        (["--queue", "-1"], "--queue is -1; allowed: 0 or more"),
        (["--max-seconds", "nan"], "--max-seconds is nan; allowed: above 0"),
        (["--drain-seconds", "-1"], "--drain-seconds is -1; allowed: 0 or more"),
        (["--name", " "], "--name is  ; allowed: no empty one"),
        (["--rows", "0"], "--rows is 0; allowed: at least 1"),
        (["--keys-file", "nowhere"], "No such file or directory: 'nowhere'"),
        (["--drafts", "1", "--port", "0"], "1 drafts a step; allowed: 0 to 0"),
    ],
)
def test_a_mistake_is_one_line(run, args, said, capsys):
    line = mistake_of(main, ["--checkpoint", str(run), *args], capsys)
    assert " ".join(said.split()) in line


def test_a_port_in_use_is_one_line(run, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = mistake_of(main, ["--checkpoint", str(run), "--port", port], capsys)
    assert f"--port {port}: Address already in use" in line


def test_a_folder_that_is_none_is_one_line(capsys, tmp_path):
    line = mistake_of(main, ["--checkpoint", str(tmp_path / "no"), "--port", "0"], capsys)
    assert "no such folder" in line


@contextmanager
def served(run: Path, *args: str) -> Iterator[tuple[subprocess.Popen, str, list[str]]]:
    """The process, its address, and what it says."""
    command = [sys.executable, "-m", "dsv3_jax.serve", "--checkpoint", str(run), "--port", "0"]
    command += ["--rows", "2", "--no-warm-up", "--dtype", "float32", *args]
    environment = os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(run.parent / "programs"),  # those of the tests' own runs
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "DSV3_ALLOCATOR": "default",
    }
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    said: list[str] = []
    try:
        for line in process.stderr:
            said.append(line)
            if found := re.search(r" at (http://\S+)", line):
                break
        reading = threading.Thread(target=lambda: said.extend(process.stderr), daemon=True)
        reading.start()
        yield process, found[1], said
    finally:
        process.kill()
        process.wait()
        reading.join()
        process.stderr.close()


@pytest.mark.slow
def test_told_to_leave_it_ends_what_runs_and_takes_no_more(run, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}")
    with served(run, "--chat-template", str(template)) as (process, base, said):
        assert ask(base, "/tokenizer_info").json()["chat_template"] == template.read_text()
        assert ask(base, "/v1/models").json()["data"][0]["id"] == "small"
        with streaming(base, "/v1/completions", ENDLESS) as reply:
            process.send_signal(signal.SIGTERM)
            last = list(events(reply.read()))[-1]
        assert last["choices"][0]["finish_reason"] in ("length", "stop")
        assert process.wait(30) == 128 + signal.SIGTERM
        with pytest.raises(ConnectionRefusedError):
            open_socket(base)
    assert "Traceback" not in "".join(said)


@pytest.mark.slow
def test_killed_it_loses_only_what_ran(run, tmp_path):
    """The folder is as it was; another server over it answers as the first did."""
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    body = {"prompt": "some", "max_tokens": 5, "temperature": 0}
    keys = tmp_path / "keys"
    keys.write_text("k\n")
    texts = []
    for _ in range(2):
        with served(run, "--keys-file", str(keys), "--host", "0.0.0.0") as (process, base, said):
            headers = {"content-type": "application/json", "authorization": "Bearer k"}
            base = base.replace("0.0.0.0", "127.0.0.1")
            texts.append(ask(base, "/v1/completions", body, headers=headers).json()["choices"])
            with open_socket(base) as client:
                client.sendall(raw_request("/v1/completions", ENDLESS, "authorization: Bearer k"))
                client.recv(100)
                process.kill()
                process.wait()
    assert texts[0] == texts[1]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert "warning" not in "".join(said)
