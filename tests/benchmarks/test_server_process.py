"""Servers as processes: found, asked by turns, ended."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
FAKE = Path(__file__).with_name("openai_servers.py")
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a script that lies in that folder, and for a contender."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "contenders")


def test_a_server_is_found_asked_by_turns_and_ended(tmp_path: Path):
    from contenders.load_table import load_table
    from contenders.side_by_side import Contender, started, take_turns

    options = {
        "command": [sys.executable, str(FAKE)],
        "packages": ["numpy", "pytest"],
        "requests": 5,
        "prompt": (1, 3),
        "tokens": (2, 4),
        "rows": 2,
        "warm_up": 1,
        "seed": 0,
        "loads": [{"rate": 200.0}, {"clients": 2}],
    }
    text = tmp_path / "text.json"  # tokens of two characters each
    text.write_text(json.dumps({"ids": [*range(50)], "pieces": ["ab"] * 50}))
    options["text"] = str(text)
    one = Contender("fake", "serving", sys.executable, "serve_http.py", options, 0)
    with started([one]) as running:
        assert take_turns(running, 2) == [one]
        (server,) = _children(one.process.pid)
    assert one.facts["versions"] == f"numpy {np.__version__}, pytest {pytest.__version__}"
    assert [len(turn) for turn in one.loads] == [2, 2]
    outcomes = [each for turn in one.loads for load in turn for each in load["outcomes"]]
    assert len(outcomes) == 20
    assert {status for *_, status in outcomes} == {200}
    assert all(2 <= tokens <= 4 and prompt % 2 == 0 for *_, tokens, prompt, _ in outcomes)
    assert 1e6 < one.peak_bytes < 1e9
    assert _gone(server)  # though who started it was killed
    assert len(load_table([one], options["loads"])) == 6


def _children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _gone(pid: int) -> bool:
    """Soon, or at least a zombie that nobody has asked for."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_a_server_that_does_not_come_up_tells_why():
    from server_process import started

    code = "import sys; print('lots', file=sys.stderr); sys.exit('no such model')"
    with pytest.raises(SystemExit, match="no such model"), started([sys.executable, "-c", code]):
        pass
    with pytest.raises(SystemExit, match="exit 3"), started([sys.executable, "-c", "exit(3)"]):
        pass


@pytest.mark.parametrize(
    "said",
    [
        "serving model at http://127.0.0.1:{port}",
        "INFO:     Uvicorn running on http://127.0.0.1:{port} (Press CTRL+C to quit)",
    ],
)
def test_a_server_says_where_it_is_in_its_own_words(said: str):
    from server_process import started

    code = (
        "import socket, sys, time\n"
        "listening = socket.create_server(('127.0.0.1', 0))\n"
        f"print({said!r}.format(port=listening.getsockname()[1]), file=sys.stderr, flush=True)\n"
        "sum(range(10**6))\n"
        "time.sleep(60)\n"
    )
    with started([sys.executable, "-c", code]) as server:
        assert server.port > 0
        assert 0 < server.cpu_seconds() < 10
        os.kill(server.pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, signal.SIGKILL)
