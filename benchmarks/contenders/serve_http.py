"""Starts an OpenAI-compatible server and asks it for completions over loopback, all loads once for
every line read.

Run by serve_cpu.py; the one argument is JSON. Imports nothing but the standard library, so that the
processor's time is left to the server.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from answering import answer, forget_peak_memory, peak_memory
from arrivals import Arrival
from http_client import Answer, ask
from loads import Turns
from server_process import ServerProcess, started


def main() -> None:
    options = json.loads(sys.argv[1])
    pieces = json.loads(Path(options["text"]).read_text(encoding="utf-8"))["pieces"]
    with started(options["command"]) as server:
        turns = Turns(
            options,
            pieces,
            partial(completed, server),
            server.cpu_seconds,
            partial(peak_memory, server.pid),
        )
        for _ in range(options["warm_up"]):
            turns.warm_up()
        forget_peak_memory(server.pid)
        answer(turns, warm_up=0, versions=versions(options["command"][0], options["packages"]))


async def completed(server: ServerProcess, arrival: Arrival) -> Answer:
    """As text, since not every server takes ids."""
    fields = {
        "prompt": "".join(arrival.prompt),
        "max_tokens": arrival.tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return await ask(server.host, server.port, "/v1/completions", fields)


def versions(python: str, packages: Sequence[str]) -> str:
    """Of packages that an interpreter has."""
    code = (
        "import sys; from importlib.metadata import version; "
        "print(', '.join(f'{name} {version(name)}' for name in sys.argv[1:]))"
    )
    command = [python, "-c", code, *packages]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
