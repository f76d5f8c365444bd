"""The processes of one run: how one joins the others, and the words they exchange on the host.

Every process runs the same program on the same configuration; process 0 writes files and prints.
What could differ between them (what a disk says, what a folder is called) is told by words through
the job's coordinator, which process 0 runs. Topics keep apart what several threads say; within a
topic every process speaks as often as the others. In one process all of this returns at once.

JAX's client of the coordinator has no public name; it is used here alone.
"""

import itertools
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import jax

# A process that the coordinator has not heard for so long counts as dead: the others then end, too.
# The local launcher sees a death at once.
HEARTBEAT_SECONDS = 60
SHUTDOWN_SECONDS = 600  # the first process may be drawing the report while the others are done
_POLL_MS = 500  # signals are heard in between
_rounds: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)


def join(place: tuple[int, int, str] | None) -> None:
    """Waits for the other processes. `place`: which one this is, of how many, and where the first
    one listens; with None, JAX finds them: SLURM's, a Kubernetes JobSet's, a TPU pod's.

    ValueError, one line, where there are none to be found, or not in time.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _keep_stdout()
    number, total, address = place or (None, None, None)
    try:
        jax.distributed.initialize(
            address,
            total,
            number,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"--launch: the other processes were not found: {' '.join(str(error).split())[:200]}"
        ) from error


def _keep_stdout() -> None:
    """For us alone: gloo prints a line for each connection from C++."""
    sys.stdout.flush()
    ours, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.close(nothing)
    sys.stdout = open(ours, "w", buffering=1, encoding=sys.stdout.encoding, errors="replace")  # noqa: SIM115


def index() -> int:
    """Of this process, from 0."""
    return jax.process_index()


def count() -> int:
    """Of all processes of this run."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this is the one that writes and prints."""
    return index() == 0


def gather(topic: str, word: str) -> list[str]:
    """What every process says, in their order; all wait for all."""
    if count() == 1:
        return [word]
    client, round_ = _client(), next(_rounds[topic])
    base = f"dsv3/{topic}/{round_}"
    client.key_value_set(f"{base}/{index()}", word)
    if is_first():
        words = [_waited_for(client, f"{base}/{i}") for i in range(count())]
        # Whoever speaks in this round has heard the last one's result.
        client.key_value_delete(f"dsv3/{topic}/{round_ - 1}")
        client.key_value_set(f"{base}/all", json.dumps(words))
        return words
    return json.loads(_waited_for(client, f"{base}/all"))


def wait(topic: str) -> None:
    """Until every process is here."""
    gather(topic, "")


def of_first(topic: str, make: Callable[[], str]) -> str:
    """What `make` returns in the first process, in all of them. ValueError or OSError that it
    raises there is raised by all.
    """
    if count() == 1:
        return make()
    return together(topic, lambda: make() if is_first() else "")[0]


def together(topic: str, make: Callable[[], str]) -> list[str]:
    """`gather` of what `make` returns. If it fails anywhere, with ValueError or OSError, it fails
    everywhere: with its own error here, or else with the first process's that failed.
    """
    own: Exception | None = None
    try:
        word = {"said": make()}
    except (ValueError, OSError) as error:
        own, word = error, {"failed": str(error), "kind": isinstance(error, OSError)}
    words = [json.loads(text) for text in gather(topic, json.dumps(word))]
    if own:
        raise own
    for number, said in enumerate(words):
        if "failed" in said:
            kind: type[Exception] = OSError if said["kind"] else ValueError
            raise kind(said["failed"] if number == 0 else f"process {number}: {said['failed']}")
    return [said["said"] for said in words]


def check_same(topic: str, what: str, word: str) -> None:
    """ValueError in every process if they differ in `word`."""
    words = gather(topic, word)
    for number, other in enumerate(words):
        if other != words[0]:
            raise ValueError(
                f"process {number} of {count()} has another {what} than process 0; allowed: the "
                "same command, files and text everywhere"
            )


def post(topic: str, word: str) -> None:
    """Says something that others may or may not look for; overwrites what was said before."""
    if count() > 1:
        _client().key_value_set(f"dsv3/{topic}/{index()}", word, allow_overwrite=True)


def posted(topic: str, number: int) -> str | None:
    """What a process posted last; None if it has said nothing."""
    try:
        return _client().key_value_try_get(f"dsv3/{topic}/{number}")
    except jax.errors.JaxRuntimeError:
        return None


def _waited_for(client: Any, key: str) -> str:
    """A word, whenever it comes: who does not speak has died, which ends this process, too."""
    while True:
        try:
            return client.blocking_key_value_get(key, _POLL_MS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _client() -> Any:
    from jax._src import distributed

    return distributed.global_state.client
