"""`python -m dsv3_jax.serve`: an OpenAI-compatible server over a model of ours, or a Hugging Face
folder's.
"""

import ipaddress
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dsv3_jax import process
from dsv3_jax.cli import clean_on_signals, parse, run, to_stderr, user_errors
from dsv3_jax.inference.options import EngineOptions, own_names
from dsv3_jax.inference.settings import EngineConfig

if TYPE_CHECKING:
    from dsv3_jax.inference.engine import Engine
    from dsv3_jax.server.app import Service
    from dsv3_jax.server.keys import Keys

PROG = "python -m dsv3_jax.serve"
DESCRIPTION = """Serve a model to OpenAI's clients, to curl and to browsers.

It answers /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics (Prometheus),
/tokenize, /detokenize and /openapi.json, and has a page to chat at /. API keys, if there are any,
are read from --keys-file, one a line, or from the environment's DSV3_API_KEYS, between commas; then
all but /health and the page's own text wants one. SIGTERM or Ctrl-C takes no more requests, ends
those that run within --drain-seconds, and leaves. The options from --rows on are those of the
engine.
"""


@dataclass(frozen=True)
class Options:
    """The command's options."""

    checkpoint: Path
    """A run's folder, its `checkpoints` or one `step_...` in it; or a Hugging Face folder"""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for all of this machine's"""
    port: int = 8000
    """0 takes one that is free, and says which"""
    name: str | None = None
    """What clients call the model; default: its folder's name"""
    keys_file: Path | None = None
    """API keys, one a line"""
    queue: int = 64
    """Texts that may wait beyond those that run; more are refused with 429"""
    max_connections: int = 512
    """Clients at the same time"""
    max_body: int = 4_000_000
    """Bytes of a request"""
    max_prompt: int | None = None
    """Tokens of a prompt; default: as many as the model's context or the cache holds"""
    max_seconds: float = 600.0
    """Of a request, from when it was read to its end"""
    drain_seconds: int = 30
    """For requests that run when the server is told to leave"""
    warm_up: bool = True
    """Compile for all sizes before the first request, instead of when one comes"""
    chat_template: Path | None = None
    """A Jinja file; default: the folder's own, else DeepSeek's"""
    step: int | None = None
    """Of a run; default: the newest"""
    ema: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Take the run's moving average of the weights"""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of the weights; default: bfloat16 for a run, as stored for a Hugging Face folder"""
    engine: Annotated[EngineOptions, tyro.conf.arg(name="")] = field(default_factory=EngineOptions)

    def check(self) -> None:
        """ValueError, in the names of the options."""
        max_prompt = self.max_prompt
        for name, value, holds, allowed in (
            ("port", self.port, 0 <= self.port < 2**16, "0 to 65535"),
            ("queue", self.queue, self.queue >= 0, "0 or more"),
            ("max-connections", self.max_connections, self.max_connections >= 1, "1 or more"),
            ("max-body", self.max_body, self.max_body >= 1, "1 or more"),
            ("max-prompt", max_prompt, max_prompt is None or max_prompt >= 1, "1 or more"),
            ("max-seconds", self.max_seconds, 0 < self.max_seconds < 1e7, "above 0, to 1e7"),
            ("drain-seconds", self.drain_seconds, self.drain_seconds >= 0, "0 or more"),
            ("name", self.name, self.name is None or self.name.strip(), "no empty one"),
        ):
            if not holds:
                raise ValueError(f"--{name} is {value}; allowed: {allowed}")
        self.engine.check()


def main(args: Sequence[str]) -> int | None:
    """The command. SystemExit 2 for the user's mistakes."""
    default = Options(checkpoint=tyro.MISSING)
    options = parse(Options, default, prog=PROG, description=DESCRIPTION, args=args)
    with clean_on_signals(), ExitStack() as until_the_end:
        with user_errors():
            options.check()
            process.emulate(options.engine.devices)
            from dsv3_jax.server.keys import read_keys

            keys = read_keys(options.keys_file)
            listening = until_the_end.enter_context(_bound(options))
            service = _service(options, keys)
        if options.warm_up:
            _warm_up(service.thread.engine)
        return _serve(options, service, listening)


def _bound(options: Options) -> socket.socket:
    from dsv3_jax.server.http import bound

    try:
        return bound(options.host, options.port)
    except OSError as error:
        raise ValueError(
            f"--host {options.host} --port {options.port}: {error.strerror}; "
            "allowed: an address of this machine, and a port that is free"
        ) from None


def _service(options: Options, keys: "Keys") -> "Service":
    from dsv3_jax.checkpoint.model_folder import find
    from dsv3_jax.data.answers import AnswerTemplate
    from dsv3_jax.inference.engine import Engine
    from dsv3_jax.inference.opening import open_weights
    from dsv3_jax.server.app import Service
    from dsv3_jax.server.engine_thread import EngineThread
    from dsv3_jax.server.generating import Limits
    from dsv3_jax.server.jobs import Jobs

    folder = find(options.checkpoint).folder
    weights, mesh, opened = open_weights(
        options.checkpoint,
        options.engine,
        step=options.step,
        average=options.ema,
        dtype=options.dtype,
    )
    if options.chat_template is None:
        template = AnswerTemplate.of_folder(folder, opened.tokenizer)
    else:
        template = AnswerTemplate.of_file(options.chat_template, opened.tokenizer)
    with own_names():
        engine = Engine(weights, _settings(options, opened.cfg.vocab_size), mesh)
    most = engine.room - 1
    jobs = Jobs(
        options.name or folder.name,
        opened.tokenizer,
        template,
        opened.cfg.bos_id,
        opened.end_ids | template.ends(),
        engine.room,
        most if options.max_prompt is None else min(options.max_prompt, most),
    )
    limits = Limits(options.max_body, options.max_seconds)
    return Service(EngineThread(engine, options.queue), jobs, keys, limits)


def _settings(options: Options, vocab_size: int) -> "EngineConfig":
    """With what clients may wish to be told."""
    from dsv3_jax.server.protocol import MOST_TOP

    engine = options.engine
    rows = EngineConfig.rows if engine.rows is None else engine.rows
    settings = replace(engine, rows=rows).settings([])
    top = min(MOST_TOP, vocab_size)
    return replace(settings, top_logprobs=top, prompt_logprobs=True)


def _warm_up(engine: "Engine") -> None:
    from dsv3_jax.inference.progress import progress

    began = time.monotonic()
    to_stderr("compiling for all sizes: minutes the first time")
    with progress(1, lambda: "compiling", shown=sys.stderr.isatty()) as told:
        engine.warm_up(told)
    to_stderr(f"compiled in {time.monotonic() - began:.0f} s")


def _serve(options: Options, service: "Service", listening: socket.socket) -> int | None:
    """Until a signal comes, whose exit code is the command's; 1 if the engine fails."""
    from dsv3_jax.server.app import make_app
    from dsv3_jax.server.http import make_server

    host, port = listening.getsockname()[:2]
    if not service.keys and not ipaddress.ip_address(host).is_loopback:
        to_stderr("warning: whoever reaches this machine can use the model: see --keys-file")
    shown = f"[{host}]" if ":" in host else host
    server = make_server(
        make_app(service),
        connections=options.max_connections,
        drain_seconds=options.drain_seconds,
        ready=lambda: to_stderr(f"serving {service.jobs.name} at http://{shown}:{port}"),
    )

    def leave() -> None:
        server.should_exit = True

    service.thread.on_failure = leave
    server.run(sockets=[listening])
    if service.thread.failure is not None:
        traceback.print_exception(service.thread.failure)
        return 1
    return None


if __name__ == "__main__":
    process.prepare()
    run(main)
